"""Benchmarks of one model: task by task, each kept as it finishes, put together at the end.

<folder>/<variant>/<task>.json holds a task's whole harness result and what was measured on its
tokens. The same call goes on with the tasks that are missing.
"""

import contextlib
import hashlib
import io
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import EvalAcc, aggregate_groups
from lm_eval.utils import handle_non_serializable

from dlr.bench import wikitext
from dlr.bench.metering import Meter
from dlr.bench.table import headline
from dlr.bench.tasks import PERPLEXITIES, load_tasks, notes_of
from dlr.processes import agreed, is_first
from dlr.progress import tqdm
from dlr.runs import plain, write_atomically


def _data_digest(task, texts: list[str] | None = None) -> str:
    """Of the rows a task scores and shows: results of other data are not taken for this one's."""
    digest = hashlib.sha256()
    for row in texts if task is None else [task.VERSION, *task.eval_docs,
                                           *(task.fewshot_docs() or ())]:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _chance(samples: list[dict]) -> float | None:
    """Expected accuracy of guessing among the choices; None where the task offers none."""
    choices = [len(sample["resps"]) for sample in samples]
    return sum(1 / n for n in choices) / len(choices) if samples and min(choices) > 1 else None


def _run_task(lm, name: str, task, limit: float | None) -> dict:
    lm.restart_meter()
    quiet = os.environ.get("DLR_TERMINAL")              # the harness's bars would fill the log
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            result = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit)
    except AssertionError as error:                     # too few examples for num_fewshot, say
        reason = error or "an assertion failed"
        raise ValueError(f"lm-evaluation-harness refuses {name}: {reason} "
                         f"(num_fewshot={task.get_config('num_fewshot')}).") from error
    samples = result.pop("samples")[name]
    metric = headline(result["results"][name])
    outcomes = [sample.get(metric[0]) for sample in samples
                if sample["filter"] == metric[1]] if metric else []
    for config in result["configs"].values():
        if config.pop("custom_dataset", None) is not None:
            config["dataset_path"] = f"local files of {config.get('dataset_path')}"
        source = str(config.get("metadata", {}).get("config_source", ""))
        # an installation's own path is no part of a result
        if "lm_eval" in source:
            config["metadata"]["config_source"] = source[source.rindex("lm_eval"):]
    result = json.loads(json.dumps(result, default=handle_non_serializable))
    binary = outcomes and all(value in (0, 1) for value in outcomes)
    chance = _chance(samples) if samples and task.OUTPUT_TYPE == "multiple_choice" else None
    return {"harness": result, "chance": chance,
            "outcomes": "".join(str(int(v)) for v in outcomes) if binary else None,
            "meter": asdict(lm.meter)}


def _run_perplexity(lm, texts: list[str], limit: float | None) -> dict:
    if limit:
        texts = texts[:math.ceil(limit * len(texts)) if limit < 1 else int(limit)]
    lm.restart_meter()
    measured = wikitext.strided_perplexity(lm, texts)
    return {"perplexity": measured, "meter": asdict(lm.meter)}


def precision_of(base: dict) -> dict:
    """Of a base model's record what a result depends on beside its name."""
    return {name: base.get(name) for name in ("fingerprint", "dtype", "quantisation")}


def stored(path: Path, settings: dict) -> dict | None:
    """The record in `path` if it is whole and of these settings."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("settings") == settings else None


def run_benchmark(lm, names: list[str], folder: Path, *, data_dir: str | None = None,
                  num_fewshot: int | None = None, limit: float | None = None,
                  match: dict | None = None, say=print) -> dict:
    """Evaluates `lm` on tasks and groups; returns {'tasks': records, 'harness': whole result}.

    Several processes call it alike and get the same; the first reads and writes what is kept.

    Args:
        folder: where each task's result is kept as soon as it is there.
        match: records of a routed model by task; a static plan then runs each task at that model's
            measured skip on it.
    """
    names = list(dict.fromkeys(names))
    with PartialState().main_process_first():            # which downloads what the others then find
        suite = load_tasks([name for name in names if name not in PERPLEXITIES], data_dir,
                           num_fewshot)
    leaves = list(suite["tasks"]) + [name for name in names if name in PERPLEXITIES]
    records, kept = {}, 0
    with tqdm(total=len(leaves), desc=lm.loaded.name, unit="task", disable=not is_first()) as bar:
        for name in leaves:
            task, path = suite["tasks"].get(name), Path(folder) / f"{name}.json"
            texts = wikitext.texts_of(name, data_dir) if task is None else None
            settings = {"digest": lm.loaded.digest, "limit": limit,
                        "data": _data_digest(task, texts), "max_length": lm.max_length,
                        "base": precision_of(lm.loaded.base),
                        "num_fewshot": task.get_config("num_fewshot") if task is not None else None}
            if match is not None and lm.loaded.order is not None:
                met = Meter(**match[name]["meter"])
                lm.loaded.at_skip(met.skip, met.forced_share)
                settings["skip"] = round(met.skip, 6)
            record = agreed(stored(path, settings) if is_first() else None)
            kept += record is not None
            if record is None:
                notes = [] if task is None else notes_of(task, data_dir)
                measured = (_run_perplexity(lm, texts, limit) if task is None
                            else _run_task(lm, name, task, limit))
                record = plain({"settings": settings, "notes": notes} | measured)
                if is_first():
                    write_atomically(path, json.dumps(record, indent=1) + "\n")
            records[name] = record
            bar.update()
    if kept and is_first():
        say(f"{lm.loaded.name}: {kept} of {len(leaves)} tasks were finished before and are kept")
    return {"tasks": records, "harness": together(records, suite["groups"])}


def together(records: dict, groups: dict) -> dict:
    """The harness's result of all tasks at once: groups are aggregated by its own rules."""
    joined = EvalAcc(groups=groups)
    for record in records.values():
        part = record.get("harness")
        if part:
            joined.metrics |= part["results"]
            joined.configs |= part["configs"]
            joined.versions |= part["versions"]
            joined.num_fewshot |= part["n-shot"]
            joined.higher_is_better |= part["higher_is_better"]
            joined.n_samples |= part["n-samples"]
    return json.loads(json.dumps(aggregate_groups(joined)._to_eval_results(), default=str))
