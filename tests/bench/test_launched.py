"""Two processes answer one benchmark: the prompts, answers, scores and meters are those of one, which alone writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_tasks import write_tasks

import dlr.bench.run
import dlr.processes
from dlr.__main__ import main
from dlr.bench.harness import DLRLM

TASKS = ["arc_challenge", "gsm8k", "wikitext103"]
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_launched
test_launched.evaluate_twice({data!r}, {folder!r})
"""


def evaluated(data: str, noted: list, tasks: list[str] = TASKS) -> int:
    """`dlr eval` of the embedded router; `noted` gets each document's prompts and answers."""
    evaluate, perplexity = dlr.bench.run.evaluate, dlr.bench.run.wikitext.strided_perplexity

    def watched(lm, suite, **options):
        for task in suite["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": 6}, update=True)
        result = evaluate(lm, suite, **options)
        noted.extend([name, sample["prompt_hash"], sample["resps"], sample["arguments"]]
                     for name, samples in result["samples"].items() for sample in samples)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlr.bench.run, "evaluate", watched)
        patch.setattr(dlr.bench.run.wikitext, "strided_perplexity", lambda lm, texts: perplexity(lm, texts, 64, 32))
        return main(["eval", "nano-router", "--tasks", ",".join(tasks), "--num-fewshot", "2", "--batch-size", "3",
                     "--data-dir", data])


def evaluate_twice(data: str, folder: str) -> None:
    """Of one process: what it met; and what it is told where the other's model ran without its router."""
    noted, rank = [], int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlr.processes, "end", lambda: None)
        assert evaluated(data, noted) == 0
    Path(folder, f"{rank}.json").write_text(json.dumps(noted))
    made = DLRLM.__init__

    def detached(lm, **options):
        made(lm, **options)
        if rank == 1:
            lm.loaded.routing.detach()

    os.environ["DLR_RESULTS"] += "-failed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DLRLM, "__init__", detached)
        try:
            evaluated(data, [], TASKS[:1])
        except Exception as error:
            Path(folder, f"failed-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def records(results: Path) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in results.glob("evaluation/*/*/*.json")}


@pytest.mark.slow
def test_launched_evaluate_as_one(tmp_path, monkeypatch):
    data = str(write_tasks(tmp_path / "data", rows=5))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parents[n]) for n in range(3)], data=data, folder=str(tmp_path)))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launched, timeout=300, capture_output=True, text=True,
                          env=os.environ | {"DLR_RESULTS": str(tmp_path / "two")})
    assert done.returncode == 0, done.stderr[-3000:]
    noted = []
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "one"))
    assert evaluated(data, noted) == 0
    noted = json.loads(json.dumps(noted))
    assert len(noted) == 15 and len({hash for _, hash, *_ in noted}) == 10      # two filters of five generations
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [noted, noted]
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert one == two and sorted(one) == sorted(TASKS)
    assert all(record["meter"]["scored"] and 0 < record["meter"]["kept"][0] for record in one.values())
    assert done.stdout.count(f"results in {tmp_path / 'two'}/") == 1 == done.stdout.count("skip on scored tokens")
    failed = [(tmp_path / f"failed-{rank}.txt").read_text() for rank in (0, 1)]
    assert failed[1].startswith("RouterDidNotRun") and failed[0].startswith("RuntimeError: Process 1 of 2 failed: RouterDidNot")
