"""The predecessor's protocol, row by row; notebook 11 and params/predecessor say what it is.

A point of the sweep trains one method for one seed. Every row of it holds perplexity by both
averages and skip with and without padding (`dlr.measure.paragraphs`).
"""

from contextlib import closing

import torch.nn.functional as F

from dlr.base.encoding import padding_token
from dlr.measure.paragraphs import counted_by_batches
from dlr.measure.static import plan_without
from dlr.routing.budget import budget
from dlr.routing.policy import LayerDrop, RouterPolicy
from dlr.runs import KINDS, Run
from dlr.train.controls import stochastic_policy
from dlr.train.kept import keep_control
from dlr.workbook import frontier, study
from dlr.workbook.study import Bench

def open_bench(config) -> Bench:
    """As `study.open_bench`; test paragraphs are padded to one length, so that padding counts."""
    bench = study.open_bench(config)
    pad = padding_token(bench.tokenizer)
    for batch in bench.test:
        missing = config.eval_len - batch["input_ids"].shape[1]
        for name, value in (("input_ids", pad), ("attention_mask", 0)):
            batch[name] = F.pad(batch[name], (0, missing), value=value)
    return bench


def _base(bench: Bench, config, run: Run) -> list[dict]:
    return [study.base_row(bench)]


def _fixed(bench: Bench, config, run: Run) -> list[dict]:
    """Dense LoRA, or stochastic depth: at full depth, and under each fixed plan."""
    kind = config.point
    changed = config.changed(layer_drop=config.target_skip) if kind == "stochastic" else config
    policy = stochastic_policy(changed) if kind == "stochastic" else LayerDrop(0.0)
    name = KINDS[kind] + (f" {config.target_skip:.0%}" if kind == "stochastic" else "")
    with closing(study.train(bench, name, changed, run.folder / kind, policy)) as variant:
        keep_control(variant.model, variant.routing, run.folder / kind, config.steps, kind, None,
                     changed.layer_drop or None)
        rows = [study.measure(bench, variant, name, None, kind)]
        for layers in config.masks:
            label = f"{name}, without layers {' '.join(map(str, layers))}"
            rows.append(study.measure(bench, variant, label, plan_without(variant.routing, layers),
                                      kind, layers=layers))
    return rows


def _router(bench: Bench, config, run: Run) -> list[dict]:
    """The predecessor's router, whose skip is what training made it."""
    name = f"token router {config.target_skip:.0%}, weight {config.target_weight:g}"
    with closing(study.train(bench, name, config, run.folder / "router")) as variant:
        return [study.measure(bench, variant, name, RouterPolicy(), "routed", **variant.notes)]


def _depth_router(bench: Bench, config, run: Run) -> list[dict]:
    """A depth router at each budget, and the best static plan at the skip that this measured."""
    rows = []
    with closing(study.train(bench, "DLR", config, run.folder / "router")) as variant:
        for asked in sorted({config.target_skip, *config.budgets}):
            with budget(variant.model, asked):
                name = frontier.named("DLR", asked)
                rows.append(study.measure(bench, variant, name, RouterPolicy(), "routed",
                                          **variant.notes | {"target_skip": asked}))
    skips = {row["target_skip"]: row["skip"] for row in rows}
    return rows + frontier.static_frontier(bench, config, run.folder / "static", skips)


POINTS = {"base": _base, "dense": _fixed, "stochastic": _fixed, "router": _router,
          "depth_router": _depth_router}


def measure(config, run: Run) -> dict:
    """A point: its rows, and the loss of each paragraph under each row, for paired comparisons."""
    bench = open_bench(config)
    trained = 0.0 if config.point in ("base", "dense") else config.target_skip
    rows = [row | counted_by_batches(bench.tables[row["variant"]])
            | {"point": config.point, "trained_skip": trained}
            for row in POINTS[config.point](bench, config, run)]
    losses = {name: table["nll"].round(4).tolist() for name, table in bench.tables.items()}
    predicted = next(iter(bench.tables.values()))["predicted"].tolist()
    return run.finish(rows, nll=losses, predicted=predicted)
