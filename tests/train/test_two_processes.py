"""Two processes train as one does with the whole batch: one threshold, one log, the same weights; sharded too, and resumed.

They are launched twice in all, since imports take most of the time: once to train and be killed, once to go on.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import Rows, trained
from test_validation import held_out
from tiny_models import base_and_texts
from transformers import TrainingArguments

from dlr import processes
from dlr.base.models import load_base
from dlr.measure.labels import HarmLabels
from dlr.train import prepare
from dlr.train.resume import finished, whole
from dlr.train.several import share_of_batch
from dlr.train.stopping import Stopped
from dlr.train.trainer import DLRTrainer
from dlr.workbook import frontier, study
from dlr.workbook.phases.training import ParetoConfig
from dlr.workbook.places import Wanted, named

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_two_processes
test_two_processes.{work}(Path({folder!r}))
"""
LEARNT = {"batch_size": 4, "steps": 4, "save_steps": 2, "router_lr": 1e-5, "dual_rate": 0.01, "skip_adapter_rank": 2,
          "eval_steps": 2}
PHASE = {"point": "router", "bf16": False, "always_keep": 2, "keep_first_tokens": 1, "seq_len": 16, "eval_len": 32, "lora_rank": 2,
         "batch_size": 4, "steps": 2, "calibration_docs": 6, "eval_docs": 6, "budgets": [0.4], "skip_adapter_rank": 2,
         "router_hidden": 8, "adapter_tokens": 256, "order_tokens": 64, "label_tokens": 320, "label_batch": 64, "visits": 512,
         "candidates": 2, "context_tokens": 64}
NUMBERS = ("ce", "kd", "skip", "gate_entropy", "threshold", "val_ce", "val_skip", *(f"keep_{unit}" for unit in range(4)))


# -- what the processes do ------------------------------------------------------------------------------------------------
def spread(model, routing):
    """Gates half open, and none so near the threshold that a rounding flips it."""
    last = routing.router.net[-1]
    torch.manual_seed(1)
    with torch.no_grad():
        last.weight.normal_(std=2.0)
        last.bias.zero_()


def train(folder: Path, stop=None, **changes) -> None:
    """Four steps; the weights and the threshold after each step go to `folder`, in a file a process.

    A head of several rows at a time, since that is how large vocabularies run. `stop(step)` may end it.
    """
    thresholds, step_done = [], DLRTrainer.step_done
    def noted(trainer, step):
        row = step_done(trainer, step)
        thresholds.append(trainer.routing.calibration.threshold)
        if stop:
            stop(step)
        return row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DLRTrainer, "step_done", noted)
        patch.setattr("dlr.measure.logits.ELEMENTS", 97 * 4 * 5)
        # Not clipped: a norm that is added up over shards is rounded in another order.
        patch.setattr("dlr.train.trainer.TrainingArguments", partial(TrainingArguments, max_grad_norm=1e3))
        weights = trained(folder, Rows(16, equal=True), spread, held_out(6, 2), **(LEARNT | changes))
    whole_ones = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights.values())
    ends = dict(zip(weights, whole_ones)) | {"thresholds": torch.tensor(thresholds, dtype=torch.float64)}
    save_file(ends, folder / f"end-{os.environ.get('RANK', '0')}.safetensors")


def train_sharded(folder: Path, stop=None, **changes) -> None:
    """As `train`, with accelerate made to believe that FSDP2 is for processors too; its own code then runs."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    begin = AcceleratorState.__init__
    def pretending(state, *args, fsdp_plugin=None, **options):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if state._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state._mixed_precision)
            state.fsdp_plugin = fsdp_plugin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", pretending)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        train(folder, stop, shard=True, **changes)


def stopped(step: int) -> None:
    """One of the two is asked to end in its second step: both end with their third."""
    if step == 2 and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def killed(step: int) -> None:
    if step == 3 and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3:
        processes.wait()


def first_launch(folder: Path) -> None:
    """Trainings whole and sharded; of each one is cut short, after its checkpoint of step 2 or with that of step 3.

    Three held-out batches are shared by two processes, or all run by both.
    """
    train(folder / "both")
    train(folder / "both16", bf16=True, steps=2)
    train_sharded(folder / "sharded16", bf16=True, steps=2)
    with pytest.raises(Stopped, match="step 3 of 4 is saved"):
        train_sharded(folder / "sharded", stopped)
    train(folder / "killed", killed)


def second_launch(folder: Path) -> None:
    """The two that were cut short go on; then the command, which begins a run of its own."""
    train(folder / "killed")
    train_sharded(folder / "sharded")
    from dlr.__main__ import main
    assert main(["train", "pareto", "--params", str(folder / "point.yaml")]) == 0


# -- what they must have done ---------------------------------------------------------------------------------------------
def launch(folder: Path, work: str) -> subprocess.CompletedProcess:
    script = folder / f"{work}.py"
    paths = [str(Path(__file__).parents[n]) for n in range(3)]
    script.write_text(SCRIPT.format(paths=paths, work=work, folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    places = {"DLR_RESULTS": str(folder / "results"), "DLR_CACHE": str(folder / "cache")}
    return subprocess.run(command, timeout=300, capture_output=True, text=True, env=os.environ | places | {"DLR_PRESET": ""})


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    (folder / "point.yaml").write_text(json.dumps(PHASE | base_and_texts(folder)))
    first = launch(folder, "first_launch")
    assert "SIGKILL" in first.stderr and (folder / "killed" / "trainer" / "checkpoint-2").is_dir(), first.stderr[-5000:]
    second = launch(folder, "second_launch")
    assert second.returncode == 0, second.stderr[-5000:]
    return folder, second.stdout


def ends(folder: Path) -> list[dict]:
    return [load_file(folder / f"end-{rank}.safetensors") for rank in (0, 1)]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_they_train_as_one_with_the_whole_batch(launched, tmp_path):
    folder, _ = launched
    train(tmp_path)
    one, (first, second) = load_file(tmp_path / "end-0.safetensors"), ends(folder / "both")
    assert_same(first, second)
    assert len(first["thresholds"].unique()) == 4
    assert any("skip.up" in name and weight.abs().sum() > 0 for name, weight in first.items())
    for name in first:
        assert torch.allclose(first[name], one[name], atol=1e-5), name
    logs = [pd.read_csv(place / "log.csv") for place in (folder / "both", tmp_path)]
    assert [list(log["step"]) for log in logs] == [[1, 2, 3, 4]] * 2, "one writer"
    for column in NUMBERS:
        assert logs[0][column].to_numpy() == pytest.approx(logs[1][column].to_numpy(), abs=1e-5, nan_ok=True), column
    assert list(logs[0]["val_ce"].notna()) == [False, True] * 2


@pytest.mark.slow
def test_a_sharded_base_changes_no_bit(launched):
    """In bfloat16; the next test has float32."""
    whole_base, sharded = (ends(launched[0] / name) for name in ("both16", "sharded16"))
    for first, second in zip(whole_base, sharded):
        assert_same(first, second)
    log, other = (pd.read_csv(launched[0] / name / "log.csv") for name in ("both16", "sharded16"))
    assert log[list(NUMBERS)].equals(other[list(NUMBERS)])


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["killed", "sharded"])
def test_a_killed_training_goes_on_to_the_same_bits(launched, cut):
    folder, _ = launched
    for gone_on, straight in zip(ends(folder / cut), ends(folder / "both")):
        assert torch.equal(gone_on.pop("thresholds"), straight.pop("thresholds")[{"killed": 2, "sharded": 3}[cut]:])
        assert_same(gone_on, straight)
    log, other = (pd.read_csv(folder / name / "log.csv") for name in (cut, "both"))
    assert list(log["step"]) == [1, 2, 3, 4] and log[list(NUMBERS)].equals(other[list(NUMBERS)])


@pytest.mark.slow
def test_preparation_is_that_of_one_process(launched, tmp_path, monkeypatch):
    folder, _ = launched
    config = ParetoConfig(**json.loads((folder / "point.yaml").read_text()))
    model, tokenizer = load_base(config.model, dtype="float32")
    found = {}
    for place in (folder / "cache", tmp_path):
        monkeypatch.setattr(prepare, "cache_folder", lambda: place)
        found[place] = prepare.prepare(model, tokenizer, config)
    assert len(list((folder / "cache" / "prepared").glob("labels-*/*.safetensors"))) == 5, "their own files were read"
    several, alone = found.values()
    assert several.order == alone.order
    assert_same(several.adapters, alone.adapters)
    assert_same(*(vars(labels) for labels in (several.labels, alone.labels)))
    assert isinstance(alone.labels, HarmLabels) and len(alone.labels) >= 256


@pytest.mark.slow
def test_the_notebook_finds_what_they_trained(launched, monkeypatch):
    folder, said = launched
    assert "2 process(es) with 2 of a batch's 4 sequences each" in said and said.count("trained; now") == 1
    for name in ("DLR_RESULTS", "DLR_CACHE"):
        monkeypatch.setenv(name, str(folder / ("results" if name == "DLR_RESULTS" else "cache")))
    def refuse(*_, **__):
        raise AssertionError("trained again")
    monkeypatch.setattr(DLRTrainer, "train", refuse)
    monkeypatch.setattr(study, "start", refuse)
    monkeypatch.setattr("dlr.measure.evaluate.BOOTSTRAP", 10)
    config = ParetoConfig(**json.loads((folder / "point.yaml").read_text()))
    wanted = Wanted("pareto", config)
    run = wanted.start(named(wanted, "point"))
    assert run.exists and not run.done
    metrics = frontier.measure_router(study.open_bench(config), config, run)
    rows = {row["variant"]: row for row in metrics["rows"]}
    assert len(rows["DLR at 40%"]["deviance_explained"]) == 2, "what its start noted"
    assert rows["best static at 40%"]["skip"] == pytest.approx(rows["DLR at 40%"]["skip"], abs=1e-6)
    assert (run.folder / "router" / "checkpoint" / "router.safetensors").is_file()


@pytest.mark.slow
def test_a_checkpoint_is_whole_when_every_process_has_written(launched):
    kept = launched[0] / "both" / "trainer" / "checkpoint-4"
    assert whole(kept, 2) and finished(kept.parent, 4) == kept and finished(kept.parent, 5) is None
    with pytest.raises(ValueError, match=r"written by 2 process\(es\) and this run has 1"):
        whole(kept, 1)
    (kept / "rng_state_1.pth").unlink()                      # killed before the second process had written its part
    assert not whole(kept, 2)


def test_what_processes_cannot_do_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size=6 is the whole batch, which 4 processes .* set batch_size=8"):
        share_of_batch(6, 4)
    with pytest.raises(ValueError, match="spreads the base over several processes, and this is one"):
        trained(tmp_path, Rows(4), shard=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(ValueError, match="accelerate launch --cpu starts one process"):
        processes.begin()
