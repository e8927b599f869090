"""One router at every budget, beside the controls that are given the same skip.

A row is named after its variant and the budget asked for ("DLR at 25%"); its `target_skip` is that
budget, its `skip` what was measured on the test split.
"""

from contextlib import closing
from pathlib import Path

from dlr.measure.evaluate import paired_difference, skip_ratio
from dlr.measure.static import evaluate_static
from dlr.routing.budget import threshold_at
from dlr.train.settings import RunConfig
from dlr.workbook.study import (Bench, Variant, best_static_order, forced_share, routed_rows,
                                row_of, train_static)


def named(name: str, skip: float) -> str:
    """The display name of a row at a budget."""
    return f"{name} at {skip:.0%}"


def routed_frontier(bench: Bench, variant: Variant, skips: list[float]) -> list[dict]:
    """Rows of a calibrated router at each budget of `skips`, and of its controls there."""
    routing, rows = variant.routing, []
    for asked in skips:
        with routing.at(threshold=threshold_at(routing.calibration.curve, asked)):
            rows += routed_rows(bench, variant, named(variant.name, asked), target_skip=asked)
    return rows


def static_frontier(bench: Bench, config: RunConfig, folder: Path, skips: dict[float, float],
                    name: str = "best static") -> list[dict]:
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
                                    forced)
            rows.append(row_of(bench, variant, named(name, asked), table, "static", order=order,
                               target_skip=asked))
        return rows


def against_static(bench: Bench, routed: str, static: str = "best static") -> dict | None:
    """Loss of the routed model less that of the best static plan, in nats a token, paired.

    Negative: the router wins. None where either was not among the variants.
    """
    if static not in bench.tables or routed not in bench.tables:
        return None
    return paired_difference(bench.tables[routed], bench.tables[static])


def differences(bench: Bench, routed: str, static: str, skips: list[float]) -> list[dict]:
    """Loss of the router less that of the static plan, paired, one row a budget."""
    rows = []
    for asked in skips:
        name = named(routed, asked)
        difference = against_static(bench, name, named(static, asked))
        if difference is not None:
            rows.append({"target_skip": asked, "skip": skip_ratio(bench.tables[name]),
                         **difference})
    return rows
