"""One router at every budget, beside the controls that are given the same skip.

A row is named after its variant and the budget asked for ("DLR at 25%"); its `target_skip` is that
budget, its `skip` what was measured on the test split.
"""

from contextlib import closing
from pathlib import Path

from dlr.base.data import load_documents
from dlr.base.opened import load
from dlr.measure.domains import domain_differences
from dlr.measure.evaluate import paired_difference, router_logits, skip_ratio
from dlr.measure.static import evaluate_static
from dlr.routing.budget import budget, threshold_at
from dlr.train.settings import RunConfig
from dlr.workbook.study import (Bench, Variant, base_row, best_static_order, dense_row,
                                forced_share, routed_rows, row_of, stochastic_rows, train,
                                train_static)

DIAL = tuple(percent / 100 for percent in range(5, 61, 5))       # skips that `dial` asks for


def named(name: str, skip: float) -> str:
    """The display name of a row at a budget."""
    return f"{name} at {skip:.0%}"


def routed_frontier(bench: Bench, variant: Variant, skips: list[float]) -> list[dict]:
    """Rows of a calibrated router at each budget of `skips`, and of its controls there."""
    rows = []
    for asked in skips:
        with budget(variant.model, asked):
            rows += routed_rows(bench, variant, named(variant.name, asked), target_skip=asked)
    return rows


def dial(bench: Bench, variant: Variant) -> list[dict]:
    """The skip measured on the test split for each that is asked for, from 5 to 60 %; one pass."""
    logits, forced = router_logits(variant.model, variant.routing, bench.test)
    rows = []
    for asked in DIAL:
        skipped = logits <= threshold_at(variant.routing.calibration.curve, asked)
        rows.append({"asked": asked, "skip": float(skipped.sum()) / (logits.numel() + forced)})
    return rows


def static_frontier(bench: Bench, config: RunConfig, folder: Path, skips: dict[float, float],
                    name: str = "best static") -> list[dict]:
    """Rows of one healed static order at each budget; elastic as the router, or for target_skip.

    Args:
        skips: budget asked for -> the skip to measure at, the router's own.
    """
    order = best_static_order(bench, config)
    with closing(train_static(bench, name, config, folder, order, config.target_skip)) as variant:
        return static_rows(bench, variant, name, order, skips, order=order)


def static_rows(bench: Bench, variant: Variant, name: str, along: list[int],
                skips: dict[float, float], **notes) -> list[dict]:
    """Rows of the static plan along an order, on a variant's weights; `skips` as above."""
    forced = forced_share(bench, variant.config.keep_first_tokens)
    rows = []
    for asked, skip in skips.items():
        table = evaluate_static(variant.model, variant.routing, bench.test, along, skip, forced)
        rows.append(row_of(bench, variant, named(name, asked), table, "static",
                           target_skip=asked, **notes))
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


def by_domain(bench: Bench, routed: str, static: str, skips: list[float]) -> list[dict]:
    """The same for each domain of the test split, one row a budget and domain; [] without any."""
    domains = load_documents(bench.config.dataset, "test").domains
    return [{"target_skip": asked, **row} for asked in skips if domains
            for row in domain_differences(bench.tables[named(routed, asked)],
                                          bench.tables[named(static, asked)], domains)]


def measure_router(bench: Bench, config, run) -> dict:
    """A point of the frontier: one router and one static plan, at every budget, into `run`."""
    with closing(train(bench, "DLR", config, run.folder / "router")) as variant:
        rows = routed_frontier(bench, variant, config.budgets)
        dialled = dial(bench, variant)
    skips = {row["target_skip"]: row["skip"] for row in rows if row["kind"] == "routed"}
    rows += static_frontier(bench, config, run.folder / "static", skips)
    names = "DLR", "best static", config.budgets
    return run.finish(rows, against_static=differences(bench, *names), dial=dialled,
                      domains=by_domain(bench, *names))


def measure_checkpoint(bench: Bench, config, run) -> dict:
    """A router that is trained already, at every budget, beside the base and its own controls."""
    rows = [base_row(bench)]
    model, _, routing = load(config.checkpoint, variant="routed", model=bench.base)
    with closing(Variant("DLR", config, model, routing)) as variant:
        rows += routed_frontier(bench, variant, config.budgets)
        dialled = dial(bench, variant)
    return run.finish(rows, dial=dialled)


def measure_baselines(bench: Bench, config, run) -> dict:
    """A point of the frontier without a router: base, dense LoRA and stochastic depth."""
    rows = [base_row(bench), dense_row(bench, config, run.folder / "dense")]
    half = config.changed(layer_drop=0.5)
    return run.finish(rows + stochastic_rows(bench, half, run.folder / "stochastic",
                                             config.budgets))


MEASURES = {"router": measure_router, "baselines": measure_baselines,
            "checkpoint": measure_checkpoint}         # by a point's kind
