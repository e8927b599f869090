"""Notebook 05's work: every variant of an evaluation, one after the other, in one table."""

import gc
import json
from pathlib import Path

import numpy as np
import pandas as pd

from dlr.base.data import load_documents, padded_batches
from dlr.base.folder import looks_like, missing_part
from dlr.base.identity import portable
from dlr.base.opened import Opened, load
from dlr.bench.harness import DLRLM
from dlr.bench.run import precision_of, run_benchmark, stored
from dlr.bench.table import Z, row_of
from dlr.measure.agreement import agreement, paired_difference, summary
from dlr.measure.evaluate import skip_ratio
from dlr.runs import (finished_runs, from_project, plain, results_folder, slug,
                      write_atomically)
from dlr.settings import SettingsError
from dlr.workbook.phases.evaluation import EvaluationConfig, VariantSpec


def specs_of(config: EvaluationConfig, say=print) -> list[VariantSpec]:
    """The rows asked for: the base, every checkpoint of the phase on it, and `config.variants`."""
    specs = [VariantSpec(name="base", checkpoint=config.model, variant="base")]
    phases = [config.phase] if isinstance(config.phase, str) else config.phase
    base = portable({"model": config.model}, EvaluationConfig)["model"], config.revision
    for phase in filter(None, phases):
        told = f"{phase}, " if len(phases) > 1 else ""
        for run, files in finished_runs(phase).items():
            settings = files["run"].get("settings", {})
            if (settings.get("model", base[0]), settings.get("revision", "")) != base:
                continue                                     # another base model's checkpoints
            for checkpoint in sorted((results_folder() / phase / run).glob("*/checkpoint")):
                missing = looks_like(checkpoint) and missing_part(checkpoint)
                if missing:
                    say(f"warning: {run}/{checkpoint.parent.name} is left out: {missing}")
                elif looks_like(checkpoint):
                    specs.append(VariantSpec(name=f"{told}{run}, {checkpoint.parent.name}",
                                             checkpoint=str(checkpoint)))
    return specs + list(config.variants)


def _refuse_confusion(specs: list[VariantSpec]) -> None:
    names = [spec.name for spec in specs]
    folders = [slug(name) for name in names]
    for place, spec in enumerate(specs):
        if folders.count(folders[place]) > 1:
            raise SettingsError(f"Two variants are named {spec.name!r}, or so much alike that they "
                                "would share a folder; give each its own name.")
        if spec.match is not None and spec.match not in names[:place]:
            raise SettingsError(f"{spec.name!r} is to match {spec.match!r}, which is no earlier "
                                f"row ({', '.join(names)}).")


def evaluate_variants(config: EvaluationConfig, folder: Path,
                      say=print) -> tuple[list[dict], dict, list[dict]]:
    """(rows, the harness's results by variant, paired differences) of all variants, resumably.

    Raises:
        SettingsError: two rows of one name, or `match` names no earlier row.
    """
    specs = specs_of(config, say)
    _refuse_confusion(specs)
    data_dir = str(from_project(config.data_dir)) if config.data_dir else None
    rows, results, agreed = [], {}, {}
    for spec in specs:
        # a checkpoint's record knows its base's revision
        loading = config.loading_base if spec.checkpoint == config.model else config.loading
        loaded = load(spec.checkpoint, variant=spec.variant, skip=spec.skip, order=spec.order,
                      say=say, **loading)
        loaded.name = spec.name
        lm = DLRLM(loaded=loaded, batch_size=config.batch_size)
        results[spec.name] = run_benchmark(
            lm, config.tasks, folder / "tasks" / slug(spec.name), data_dir=data_dir,
            num_fewshot=config.num_fewshot, limit=config.limit, say=say,
            match=results[spec.match]["tasks"] if spec.match else None)
        rows.append(row_of(lm, results[spec.name], config.tasks))
        lm.close()
        if config.agreement_docs and loaded.routing is not None:        # the base is its own
            path = folder / "tasks" / slug(spec.name) / "agreement.json"
            agreed[spec.name] = agreement_of(config, loaded, path, agreed.get(spec.match))
            rows[-1]["agreement"] = agreement_row(agreed, spec)
        del lm, loaded                      # before the next one is loaded: a card may not hold two
        gc.collect()
    harness = {name: result["harness"] for name, result in results.items()}
    return rows, harness, paired(results, specs)


# -- free-running generation ------------------------------------------------------------------
def agreement_of(config: EvaluationConfig, loaded: Opened, path: Path,
                 match: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of `measure.agreement.agreement`, which `path` keeps.

    Args:
        match: a routed model's table; a static plan then runs at that model's skip.
    """
    documents = load_documents(config.dataset, "test")
    skip = None
    if match is not None and loaded.order is not None:
        # tokens that run everything whatever the plan; the last of the prompt chooses the first
        forced = loaded.routing.config.keep_first_tokens + 1 - match["prompt_tokens"]
        forced = float((forced.clip(0, match["tokens"]) / match["tokens"]).mean())
        skip = skip_ratio(match)
        loaded.at_skip(skip, forced)
    settings = {"digest": loaded.digest, "base": precision_of(loaded.base), "data": documents.hash,
                "prompt": config.agreement_prompt, "tokens": config.agreement_tokens,
                "documents": config.agreement_docs, "skip": skip and round(skip, 6)}
    record = stored(path, settings)
    if record is None:
        prompts = padded_batches(documents, loaded.tokenizer, config.agreement_prompt,
                                 config.batch_size, config.agreement_docs)
        table = agreement(loaded.model, loaded.routing, prompts, loaded.policy,
                          config.agreement_tokens, describe=f"{loaded.name}: generating")
        record = plain({"settings": settings, "table": table.to_dict("list")})
        write_atomically(path, json.dumps(record) + "\n")
    return pd.DataFrame(record["table"])


def agreement_row(tables: dict[str, pd.DataFrame], spec: VariantSpec) -> dict:
    """What a row says of its agreement; of a matched one `against`, the routed row's minus its."""
    row = summary(tables[spec.name])
    if spec.match in tables:
        row["against"] = paired_difference(tables[spec.match], tables[spec.name])
        row["match"] = spec.match
    return row


# -- accuracies -------------------------------------------------------------------------------
def _outcomes(record: dict) -> np.ndarray:
    return np.array(list(record["outcomes"]), int)


def paired(results: dict[str, dict], specs: list[VariantSpec]) -> list[dict]:
    """Mean accuracy of a routed row minus its matched static row's, on the same items (95 %)."""
    rows = []
    for spec in specs:
        if spec.match is None:
            continue
        routed, static = results[spec.match]["tasks"], results[spec.name]["tasks"]
        differences = [_outcomes(routed[name]) - _outcomes(static[name]) for name in static
                       if static[name].get("outcomes") and routed[name].get("outcomes")]
        if differences:
            mean = float(np.mean([d.mean() for d in differences]))
            error = float(np.sqrt(sum(d.var(ddof=1) / len(d) for d in differences if len(d) > 1))
                          / len(differences))
            rows.append({"routed": spec.match, "static": spec.name, "tasks": len(differences),
                         "difference": mean, "low": mean - Z * error, "high": mean + Z * error})
    return rows
