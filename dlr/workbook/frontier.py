"""One router at every budget, beside the controls that are given the same skip.

A row is named after its variant and the budget asked for ("DLR at 25%"); its `target_skip` is that
budget, its `skip` what was measured on the test split.
"""

from contextlib import closing
from pathlib import Path

from dlr.measure.evaluate import evaluate, paired_difference, skip_ratio
from dlr.measure.static import evaluate_static, order_of_mean_plan
from dlr.routing.budget import threshold_at
from dlr.routing.policy import RandomPlan, RouterPolicy, ShuffledPlan
from dlr.train.settings import RunConfig
from dlr.workbook.study import (Bench, Variant, best_static_order, forced_share, row_of,
                                train_static)

PLANS = ("shuffled", "mean", "random")        # controls that run on the router's own weights


def named(name: str, skip: float) -> str:
    """The display name of a row at a budget."""
    return f"{name} at {skip:.0%}"


def routed_frontier(bench: Bench, variant: Variant, skips: list[float],
                    controls: tuple = PLANS, kl: bool = False) -> list[dict]:
    """Rows of a calibrated router at each budget of `skips`, and of `controls` at its own skip.

    With `kl`, rows have the KL from the frozen base too, which takes twice the time.

    `against_router` of a control is its loss less the router's, paired: positive where the router
    wins.
    """
    routing, seed = variant.routing, variant.config.seed
    forced = forced_share(bench, routing.config.keep_first_tokens)
    rows = []
    for asked in skips:
        name = named(variant.name, asked)

        def measured(label, kind, policy=None, table=None, **notes):
            if table is None:
                table = evaluate(variant.model, routing, bench.test, policy, kl=kl,
                                 describe=label)
            row = row_of(bench, variant, label, table, kind, **notes | {"target_skip": asked})
            if kind != "routed":
                row["against_router"] = paired_difference(table, bench.tables[name])
            rows.append(row)
            return row

        with routing.at(threshold=threshold_at(routing.calibration.curve, asked)):
            own = measured(name, "routed", RouterPolicy(), **variant.notes)
            if "shuffled" in controls:
                measured(f"{name}, shuffled", "shuffled", ShuffledPlan(seed))
            if "mean" in controls:
                order = order_of_mean_plan(own["keep_rate"])
                table = evaluate_static(variant.model, routing, bench.test, order, own["skip"],
                                        forced, kl)
                measured(f"{name}, mean plan", "mean", table=table)
            if "random" in controls:
                measured(f"{name}, random plan", "random",
                         RandomPlan(min(1.0, own["skip"] / (1 - forced)), seed))
    return rows


def static_frontier(bench: Bench, config: RunConfig, folder: Path, skips: dict[float, float],
                    name: str = "best static", kl: bool = False) -> list[dict]:
    """Rows of one healed static order at each budget; elastic as the router, or for target_skip.

    Args:
        skips: budget asked for -> the skip to measure at, the router's own.
    """
    order = best_static_order(bench, config)
    forced = forced_share(bench, config.keep_first_tokens)
    with closing(train_static(bench, name, config, folder, order, config.target_skip)) as variant:
        rows = []
        for asked, skip in skips.items():
            table = evaluate_static(variant.model, variant.routing, bench.test, order, skip,
                                    forced, kl)
            rows.append(row_of(bench, variant, named(name, asked), table, "static", order=order,
                               target_skip=asked))
        return rows


def differences(bench: Bench, routed: str, static: str, skips: list[float]) -> list[dict]:
    """Loss of the router less that of the static plan, paired, one row a budget."""
    rows = []
    for asked in skips:
        names = named(routed, asked), named(static, asked)
        if all(name in bench.tables for name in names):
            tables = [bench.tables[name] for name in names]
            rows.append({"target_skip": asked, "skip": skip_ratio(tables[0]),
                         **paired_difference(*tables)})
    return rows


def against_static(bench: Bench, routed: str) -> dict | None:
    """Loss of the routed model less that of the best static plan, in nats a token, paired.

    Negative: the router wins. None where either was not among the variants.
    """
    if "best static" not in bench.tables or routed not in bench.tables:
        return None
    return paired_difference(bench.tables[routed], bench.tables["best static"])

