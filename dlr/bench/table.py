"""The table of a benchmark: a row a variant, with scores, errors, chance and measured skip."""

import importlib.metadata as metadata

import pandas as pd
from scipy.stats import binomtest

from dlr.bench.metering import Meter
from dlr.measure.flops import added_weights, flops_per_token, plan_flops_per_token

Z = 1.96                                    # half a 95 % interval in standard errors


def _metrics(result: dict) -> list[tuple[str, str]]:
    """(metric, filter) of every score, accuracies first, otherwise as the task lists them."""
    pairs = [tuple(key.split(",", 1)) for key in result if "," in key
             and not key.split(",")[0].endswith("_stderr")]
    return sorted(pairs, key=lambda pair: pair[0] not in ("acc", "exact_match"))


def headline(result: dict) -> tuple[str, str] | None:
    """The (metric, filter) a table shows first."""
    return next(iter(_metrics(result)), None)


def score_of(name: str, benchmark: dict, group_tasks: list[str]) -> dict:
    """Score, standard error, chance and what a reader has to know, of a task or a group."""
    result = benchmark["harness"]["results"][name]
    metric = headline(result)
    chosen = [benchmark["tasks"][leaf] for leaf in group_tasks]
    meter = sum((Meter(**record["meter"]) for record in chosen), Meter())
    out = {"task": name, "metric": None, "score": None, "stderr": None, "chance": None,
           "skip": meter.skip, "context_skip": meter.context_skip, "truncated": meter.truncated,
           "requests": meter.requests}
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
            out["tasks_not_above_chance"] = sorted(part["task"] for part in parts
                                                   if not part["above_chance"])
    return out


def _above(score: dict, chosen: list[dict]) -> bool:
    """Whether a score is above chance at 2.5 % (one-sided); by counted answers for one task."""
    outcomes = chosen[0]["outcomes"]
    if len(chosen) == 1 and outcomes:
        return bool(binomtest(outcomes.count("1"), len(outcomes), score["chance"],
                              "greater").pvalue < 0.025)
    return score["stderr"] is not None and score["score"] - Z * score["stderr"] > score["chance"]


def leaves_of(name: str, benchmark: dict) -> list[str]:
    """Names of the tasks below `name`, which may be a task itself."""
    children = benchmark["harness"]["group_subtasks"].get(name)
    if not children:
        return [name]
    return [leaf for child in children for leaf in leaves_of(child, benchmark)]


def row_of(lm, benchmark: dict, names: list[str]) -> dict:
    """One row of the results: scores by task, perplexity, and what was measured beside."""
    meter = sum((Meter(**record["meter"]) for record in benchmark["tasks"].values()), Meter())
    routing = lm.loaded.routing
    config, layers = lm.model.config, lm.model.config.get_text_config().num_hidden_layers
    dense = flops_per_token(config, layers, meter.mean_reach)
    row = {"variant": lm.loaded.name, "kind": lm.loaded.kind, "checkpoint": lm.loaded.checkpoint,
           "skip": meter.skip, "context_skip": meter.context_skip, "active_layers": float(layers),
           "flops": dense, "flops_dense": dense, "keep_rate": [], "requests": meter.requests,
           "truncated": meter.truncated, "scored_tokens": meter.scored}
    if routing is not None and lm.loaded.policy is not None:
        settings = routing.config
        row |= {"keep_rate": [round(rate, 4) for rate in meter.keep_rate], "unit": settings.unit,
                "always_keep": settings.always_keep}
        always = settings.always_keep + settings.keep_last
        row["active_layers"] = always + sum(meter.keep_rate) / routing.units_per_layer
        row["flops"] = plan_flops_per_token(config, meter.mean_reach, meter.keep_rate,
                                            settings.always_keep, settings.keep_last,
                                            routing.router, lm.loaded.kind == "routed")
    if routing is not None:
        row |= added_weights(routing.router, lm.loaded.kind)
    results = benchmark["harness"]["results"]
    tops = [name for name in names if name in results]
    below = {leaf for top in tops for leaf in leaves_of(top, benchmark)}
    # the tasks of tags
    tops += [name for name in benchmark["tasks"] if name in results and name not in below]
    scores = [score_of(name, benchmark, leaves_of(name, benchmark)) for name in tops]
    row["scores"] = [score for score in scores if score["metric"]]
    row["perplexity"] = {name: record["perplexity"] for name, record in benchmark["tasks"].items()
                         if "perplexity" in record}
    return row


def _said(score: dict) -> str:
    text = f"{score['score']:.4f}"
    if score["stderr"] is not None:
        text += f" ± {score['stderr']:.4f}"
    text += "".join(f"; {name.removesuffix(',none')} {value:.4f}"
                    for name, value in score.get("others", {}).items())
    below = score.get("tasks_not_above_chance")
    if below:
        text += f" ({len(below)} of {score['tasks']} tasks not above chance)"
    return text + (" (not above chance)" if score.get("above_chance") is False else "")


def _agreement(measured: dict | None) -> dict:
    """Columns of free-running agreement with the base (`dlr.measure.agreement`)."""
    if measured is None:                  # not asked for, or the base itself
        return {}
    def said(name: str, digits: int) -> str:
        value, low, high = (f"{measured[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
        return f"{value} ({low}–{high})"
    return {f"tokens agreed of {measured['tokens']} (95 %)": said("agreed_tokens", 1),
            "texts agreeing (95 %)": said("agreeing", 2),
            "KL/token, base's text (95 %)": said("kl", 3),
            "KL/token, own text (95 %)": said("kl_own_text", 3),
            "skip, generating": f"{measured['skip']:.1%}"}


def scores_table(rows: list[dict]) -> pd.DataFrame:
    """Rows of `row_of` as people read them, one line a variant."""
    lines = []
    for row in rows:
        line = {"variant": row["variant"], "skip": f"{row['skip']:.1%}",
                "active layers": f"{row['active_layers']:.2f}",
                "MFLOPs/token": f"{row['flops'] / 1e6:.2f}"}
        if "adapter_parameters" in row:          # rows recorded before do not say
            line["router + adapters, parameters"] = \
                f"{row['router_parameters']:,} + {row['adapter_parameters']:,}"
        for score in row["scores"]:
            line[f"{score['task']} ({score['metric'].split(',')[0]})"] = _said(score)
        for task, measured in row["perplexity"].items():
            for unit in ("token", "word"):
                value, low, high = (measured[f"{unit}_perplexity{end}"]
                                    for end in ("", "_low", "_high"))
                line[f"{task} ppl/{unit} (95 %)"] = f"{value:.2f} ({low:.2f}–{high:.2f})"
            line[f"{task} bits/byte"] = f"{measured['bits_per_byte']:.3f}"
        line["cut on the left"] = f"{row['truncated']} of {row['requests']}"
        lines.append(line | _agreement(row.get("agreement")))
    return pd.DataFrame(lines).fillna("–")


def environment() -> dict:
    """Versions of what produced the scores."""
    return {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers", "peft",
                                                      "datasets")}
