"""Two processes train one model: one threshold, one log, the same weights, and what one process does with both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import Rows, trained

from dlr.train.trainer import DLRTrainer, whole

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_two_processes
test_two_processes.train(Path({folder!r}), batch_size=2)
"""


def spread(model, routing):
    """Gates half open, and none so near the threshold that a rounding flips it."""
    last = routing.router.net[-1]
    torch.manual_seed(1)
    with torch.no_grad():
        last.weight.normal_(std=2.0)
        last.bias.zero_()


def train(folder: Path, batch_size: int) -> None:
    """Four steps; the weights and the threshold after each step go to `folder`, in a file a process."""
    thresholds, step_done = [], DLRTrainer.step_done
    def noted(trainer, step):
        row = step_done(trainer, step)
        thresholds.append(trainer.routing.calibration.threshold)
        return row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DLRTrainer, "step_done", noted)
        weights = trained(folder, Rows(16, equal=True), spread, batch_size=batch_size, steps=4, save_steps=2, router_lr=1e-5,
                          dual_rate=0.01)
    weights["thresholds"] = torch.tensor(thresholds, dtype=torch.float64)
    save_file(weights, folder / f"end-{os.environ.get('RANK', '0')}.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    both.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parents[n]) for n in range(3)], folder=str(both)))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launched, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train(alone, batch_size=4)
    first, second = (load_file(both / f"end-{rank}.safetensors") for rank in (0, 1))
    one = load_file(alone / "end-0.safetensors")
    assert torch.equal(first["thresholds"], second["thresholds"]) and len(first["thresholds"].unique()) == 4
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], one[name], atol=2e-5), name
    logs = [pd.read_csv(folder / "log.csv") for folder in (both, alone)]
    assert [list(log["step"]) for log in logs] == [[1, 2, 3, 4]] * 2, "one writer"
    for column in ("ce", "kd", "skip", "gate_entropy", "threshold", *(f"keep_{unit}" for unit in range(4))):
        assert logs[0][column].to_numpy() == pytest.approx(logs[1][column].to_numpy(), abs=1e-5), column
    kept = both / "trainer" / "checkpoint-4"
    assert whole(kept, 2)
    with pytest.raises(ValueError, match=r"written by 2 process\(es\) and this run has 1"):
        whole(kept, 1)
    (kept / "rng_state_1.pth").unlink()                      # killed before the second process had written its part
    assert not whole(kept, 2)
