"""Benchmarks of one model: task by task, each kept as it finishes, put together as the harness would.

<folder>/<variant>/<task>.json holds a task's whole harness result and what was measured on its tokens. The same call goes
on with the tasks that are missing.
"""

import contextlib
import gc
import hashlib
import io
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from dlr import wikitext
from dlr.flops import flops_per_token, plan_flops_per_token
from dlr.metering import Meter
from dlr.progress import tqdm
from dlr.runs import from_project, plain, slug, write_atomically
from dlr.tasks import PERPLEXITIES, load_tasks, notes_of

Z = 1.96                                    # half a 95 % interval in standard errors


def _metrics(result: dict) -> list[tuple[str, str]]:
    """(metric, filter) of every score in a result, accuracies first, otherwise as the task's definition lists them."""
    found = [tuple(key.split(",", 1)) for key in result if "," in key and not key.split(",")[0].endswith("_stderr")]
    return sorted(found, key=lambda pair: pair[0] not in ("acc", "exact_match"))


def _headline(result: dict) -> tuple[str, str] | None:
    """The (metric, filter) a table shows first."""
    return next(iter(_metrics(result)), None)


def _data_digest(task, texts: list[str] | None = None) -> str:
    """Of the rows a task scores and shows as examples: results of other data are not taken for this one's."""
    digest = hashlib.sha256()
    for row in texts if task is None else [task.VERSION, *task.eval_docs, *(task.fewshot_docs() or ())]:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _chance(samples: list[dict]) -> float | None:
    """Expected accuracy of guessing among the choices; None where the task offers none."""
    choices = [len(sample["resps"]) for sample in samples]
    return sum(1 / n for n in choices) / len(choices) if samples and min(choices) > 1 else None


def _run_task(lm, name: str, task, limit: float | None) -> dict:
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable
    meter = lm.restart_meter()
    with contextlib.redirect_stderr(io.StringIO()) if os.environ.get("DLR_TERMINAL") else contextlib.nullcontext():
        try:
            whole = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit)
        except AssertionError as error:                  # how the harness refuses, for example more examples than there are
            raise ValueError(f"lm-evaluation-harness refuses {name}: {error or 'an assertion failed'} "
                             f"(num_fewshot={task.get_config('num_fewshot')}).") from error
    samples = whole.pop("samples")[name]
    metric = _headline(whole["results"][name])
    outcomes = [sample.get(metric[0]) for sample in samples if sample["filter"] == metric[1]] if metric else []
    for config in whole["configs"].values():
        if config.pop("custom_dataset", None) is not None:
            config["dataset_path"] = f"local files of {config.get('dataset_path')}"
        source = str(config.get("metadata", {}).get("config_source", ""))
        if "lm_eval" in source:                         # an installation's own path is no part of a result
            config["metadata"]["config_source"] = source[source.rindex("lm_eval"):]
    whole = json.loads(json.dumps(whole, default=handle_non_serializable))
    binary = outcomes and all(value in (0, 1) for value in outcomes)
    return {"harness": whole, "chance": _chance(samples) if samples and task.OUTPUT_TYPE == "multiple_choice" else None,
            "outcomes": "".join(str(int(v)) for v in outcomes) if binary else None, "meter": asdict(meter)}


def _run_perplexity(lm, texts: list[str], limit: float | None) -> dict:
    if limit:
        texts = texts[:math.ceil(limit * len(texts)) if limit < 1 else int(limit)]
    meter = lm.restart_meter()
    return {"perplexity": wikitext.strided_perplexity(lm, texts), "meter": asdict(meter)}


def precision_of(base: dict) -> dict:
    """Of a base model's record what a result depends on beside its name."""
    return {name: base.get(name) for name in ("fingerprint", "dtype", "quantisation")}


def _stored(path: Path, settings: dict) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("settings") == settings else None


def run_benchmark(lm, names: list[str], folder: Path, *, data_dir: str | None = None, num_fewshot: int | None = None,
                  limit: float | None = None, match: dict | None = None, say=print) -> dict:
    """Evaluates `lm` on the named tasks and groups; returns {'tasks': records, 'harness': the harness's whole result}.

    Args:
        folder: where each task's result is kept as soon as it is there.
        match: records of a routed model by task; a static plan then runs each task at that model's measured skip on it.
    """
    names = list(dict.fromkeys(names))
    suite = load_tasks([name for name in names if name not in PERPLEXITIES], data_dir, num_fewshot)
    leaves = list(suite["tasks"]) + [name for name in names if name in PERPLEXITIES]
    records, kept = {}, 0
    with tqdm(total=len(leaves), desc=lm.loaded.name, unit="task") as bar:
        for name in leaves:
            task, path = suite["tasks"].get(name), Path(folder) / f"{name}.json"
            texts = wikitext.texts_of(name, data_dir) if task is None else None
            settings = {"digest": lm.loaded.digest, "limit": limit, "data": _data_digest(task, texts),
                        "max_length": lm.max_length, "base": precision_of(lm.loaded.base),
                        "num_fewshot": task.get_config("num_fewshot") if task is not None else None}
            if match is not None and lm.loaded.order is not None:
                met = Meter(**match[name]["meter"])
                lm.loaded.at_skip(met.skip, met.forced_share)
                settings["skip"] = round(met.skip, 6)
            found = _stored(path, settings)
            kept += found is not None
            if found is None:
                found = _run_perplexity(lm, texts, limit) if task is None else _run_task(lm, name, task, limit)
                found = plain({"settings": settings, "notes": notes_of(task, data_dir) if task is not None else []} | found)
                write_atomically(path, json.dumps(found, indent=1) + "\n")
            records[name] = found
            bar.update()
    if kept:
        say(f"{lm.loaded.name}: {kept} of {len(leaves)} tasks were finished before and are kept")
    return {"tasks": records, "harness": together(records, suite["groups"])}


def together(records: dict, groups: dict) -> dict:
    """The harness's result of all tasks at once: theirs joined, groups aggregated by the harness's own rules."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups
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


# -- the table ----------------------------------------------------------------------------------------------------------
def score_of(name: str, benchmark: dict, group_tasks: list[str]) -> dict:
    """Score, standard error, chance and what a reader has to know, of a task or of a group of tasks."""
    result = benchmark["harness"]["results"][name]
    metric = _headline(result)
    chosen = [benchmark["tasks"][leaf] for leaf in group_tasks]
    meter = sum((Meter(**record["meter"]) for record in chosen), Meter())
    out = {"task": name, "metric": None, "score": None, "stderr": None, "chance": None, "skip": meter.skip,
           "context_skip": meter.context_skip, "truncated": meter.truncated, "requests": meter.requests}
    if metric is None:
        return out
    error = result.get(f"{metric[0]}_stderr,{metric[1]}")
    chances = [record["chance"] for record in chosen]
    out |= {"metric": ",".join(metric), "score": result[",".join(metric)],
            "stderr": error if isinstance(error, float) else None,
            "chance": sum(chances) / len(chances) if None not in chances else None,
            "notes": sorted({note for record in chosen for note in record["notes"]}),
            "others": {",".join(pair): result[",".join(pair)] for pair in _metrics(result)[1:]}}
    if out["chance"] is not None:
        out["above_chance"] = _above(out, chosen)
        if len(chosen) > 1:
            parts = [score_of(leaf, benchmark, [leaf]) for leaf in group_tasks]
            out["tasks"] = len(parts)
            out["tasks_not_above_chance"] = sorted(part["task"] for part in parts if not part["above_chance"])
    return out


def _above(score: dict, chosen: list[dict]) -> bool:
    """Whether a score is above chance at 2.5 % (one-sided): the exact binomial test for one task of rights and wrongs."""
    outcomes = chosen[0]["outcomes"]
    if len(chosen) == 1 and outcomes:
        from scipy.stats import binomtest
        return bool(binomtest(outcomes.count("1"), len(outcomes), score["chance"], "greater").pvalue < 0.025)
    return score["stderr"] is not None and score["score"] - Z * score["stderr"] > score["chance"]


def leaves_of(name: str, benchmark: dict) -> list[str]:
    """Names of the tasks below `name`, which may be a task itself."""
    children = benchmark["harness"]["group_subtasks"].get(name)
    return [leaf for child in children for leaf in leaves_of(child, benchmark)] if children else [name]


def row_of(lm, benchmark: dict, names: list[str]) -> dict:
    """One row of the results table: scores by task, perplexity, and what was measured on the scored tokens."""
    meter = sum((Meter(**record["meter"]) for record in benchmark["tasks"].values()), Meter())
    routing = lm.loaded.routing
    config, layers = lm.model.config, lm.model.config.get_text_config().num_hidden_layers
    dense = flops_per_token(config, layers, meter.mean_reach)
    row = {"variant": lm.loaded.name, "kind": lm.loaded.kind, "checkpoint": lm.loaded.checkpoint, "skip": meter.skip,
           "context_skip": meter.context_skip, "active_layers": float(layers), "flops": dense, "flops_dense": dense,
           "keep_rate": [], "requests": meter.requests, "truncated": meter.truncated, "scored_tokens": meter.scored}
    if routing is not None and lm.loaded.policy is not None:
        settings = routing.config
        row |= {"keep_rate": [round(rate, 4) for rate in meter.keep_rate], "unit": settings.unit,
                "always_keep": settings.always_keep}
        row["active_layers"] = settings.always_keep + settings.keep_last + sum(meter.keep_rate) / routing.units_per_layer
        router = settings.router_hidden if lm.loaded.kind == "routed" else 0
        row["flops"] = plan_flops_per_token(config, meter.mean_reach, meter.keep_rate, settings.always_keep,
                                            settings.keep_last, router, settings.skip_adapter_rank)
    found = benchmark["harness"]["results"]
    tops = [n for name in names for n in ([name] if name in found else [])]
    tops += [name for name in benchmark["tasks"] if name in found and not any(
        name in leaves_of(top, benchmark) for top in tops)]         # a tag is no result of its own: its tasks are
    row["scores"] = [score_of(name, benchmark, leaves_of(name, benchmark)) for name in tops]
    row["scores"] = [s for s in row["scores"] if s["metric"]]
    row["perplexity"] = {name: record["perplexity"] for name, record in benchmark["tasks"].items()
                         if "perplexity" in record}
    return row


# -- several variants -----------------------------------------------------------------------------------------------------
def specs_of(config, say=print) -> list:
    """The rows an evaluation asks for: the base model, every checkpoint of `config.phase`, and `config.variants`."""
    from dlr.config import VariantSpec
    from dlr.folder import looks_like, missing_part
    from dlr.runs import finished_runs, results_folder
    specs = [VariantSpec(name="base", checkpoint=config.model, variant="base")]
    for run, found in (finished_runs(config.phase) if config.phase else {}).items():
        if found["run"].get("settings", {}).get("model", config.model) != config.model:
            continue                                         # another base model's checkpoints
        folders = sorted(path.parent for path in (results_folder() / config.phase / run).glob("*/checkpoint"))
        for folder in folders:
            missing = missing_part(folder / "checkpoint") if looks_like(folder / "checkpoint") else None
            if missing:
                say(f"warning: {'/'.join(folder.parts[-2:])} is left out: {missing}")
            elif looks_like(folder / "checkpoint"):
                specs.append(VariantSpec(name=f"{run}, {folder.name}", checkpoint=str(folder / "checkpoint")))
    return specs + list(config.variants)


def evaluate_variants(config, folder: Path, say=print) -> tuple[list[dict], dict, list[dict]]:
    """(rows, the harness's whole result by variant, paired differences) of every variant `config` asks for, resumably.

    Args:
        config: an EvaluationConfig.

    Raises:
        SettingsError: two rows of one name, or `match` names no earlier row.
    """
    from dlr.config import SettingsError
    from dlr.harness import DLRLM
    from dlr.opened import load
    specs, rows, whole, by_name = specs_of(config, say), [], {}, {}
    names = [spec.name for spec in specs]
    for spec in specs:
        if names.count(spec.name) > 1:
            raise SettingsError(f"Two variants are named {spec.name!r}; give each its own name.")
        if spec.match is not None and spec.match not in names[:names.index(spec.name)]:
            raise SettingsError(f"{spec.name!r} is to match {spec.match!r}, which is no earlier row ({', '.join(names)}).")
    for spec in specs:
        loaded = load(spec.checkpoint, variant=spec.variant, skip=spec.skip, order=spec.order, say=say, dtype=config.dtype,
                      attn_implementation=config.attn_implementation, load_in_4bit=config.load_in_4bit)
        loaded.name = spec.name
        lm = DLRLM(loaded=loaded, batch_size=config.batch_size)
        data_dir = str(from_project(config.data_dir)) if config.data_dir else None
        found = run_benchmark(lm, config.tasks, folder / "tasks" / slug(spec.name), data_dir=data_dir,
                              num_fewshot=config.num_fewshot, limit=config.limit, say=say,
                              match=by_name[spec.match]["tasks"] if spec.match else None)
        by_name[spec.name] = found
        rows.append(row_of(lm, found, config.tasks))
        whole[spec.name] = found["harness"]
        lm.close()
        del lm, loaded                                   # before the next model is loaded: two do not fit on one card
        gc.collect()
    return rows, whole, paired(by_name, specs)


def paired(by_name: dict, specs: list) -> list[dict]:
    """Mean accuracy over tasks of a routed row minus that of the static row matched to it, on the same items (95 %)."""
    import numpy as np
    out = []
    for spec in specs:
        if spec.match is None:
            continue
        routed, static = by_name[spec.match]["tasks"], by_name[spec.name]["tasks"]
        differences = [np.array(list(routed[name]["outcomes"]), int) - np.array(list(static[name]["outcomes"]), int)
                       for name in static if static[name].get("outcomes") and routed[name].get("outcomes")]
        if differences:
            mean = float(np.mean([d.mean() for d in differences]))
            error = float(np.sqrt(sum(d.var(ddof=1) / len(d) for d in differences if len(d) > 1)) / len(differences))
            out.append({"routed": spec.match, "static": spec.name, "tasks": len(differences), "difference": mean,
                        "low": mean - Z * error, "high": mean + Z * error})
    return out
