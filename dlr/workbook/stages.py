"""What each stage of the method adds over the one before, at every budget; notebook 10.

closed form (the static plan with ridge adapters) -> regressed (a router fitted to harm labels) ->
in context (labels of the router's own plans) -> healed (LoRA and adapters trained under its plans)
-> end to end (the router trained too, by gradients). Nothing is trained before "healed".
"""

from contextlib import closing

from dlr.figures.stages import STAGES
from dlr.measure.evaluate import paired_difference
from dlr.routing.budget import budget
from dlr.routing.policy import RouterPolicy
from dlr.train.prepare import context_batches
from dlr.train.regress import start
from dlr.workbook.frontier import named, static_rows
from dlr.workbook.study import Bench, Variant, fresh_variant, measure, train


def _at_budgets(bench: Bench, variant: Variant, stage: str, budgets: list[float]) -> list[dict]:
    rows = []
    for asked in budgets:
        with budget(variant.model, asked):
            rows.append(measure(bench, variant, named(stage, asked), RouterPolicy(), "routed",
                                stage=stage, target_skip=asked))
    return rows


def _started(bench: Bench, config) -> list[dict]:
    """Rows of the stages before any gradient."""
    preparation = bench.preparation(config, labels=True)
    with closing(fresh_variant(bench, "DLR", config, preparation)) as variant:
        start(variant.model, variant.routing, preparation.labels, bench.calibration, config)
        rows = _at_budgets(bench, variant, "regressed", config.budgets)
        skips = {row["target_skip"]: row["skip"] for row in rows}
        rows += static_rows(bench, variant, "closed form", preparation.order, skips,
                            stage="closed form")
        context = context_batches(bench.tokenizer, config)
        if context:
            start(variant.model, variant.routing, preparation.labels, bench.calibration, config,
                  context)
            rows += _at_budgets(bench, variant, "in context", config.budgets)
    return rows


def gains(bench: Bench, budgets: list[float]) -> list[dict]:
    """Loss of each stage less that of the stage before, in nats a token, paired, by budget."""
    rows = []
    for asked in budgets:
        there = [stage for stage in STAGES if named(stage, asked) in bench.tables]
        for before, stage in zip(there, there[1:]):
            tables = (bench.tables[named(name, asked)] for name in (stage, before))
            rows.append({"target_skip": asked, "stage": stage, "before": before,
                         **paired_difference(*tables)})
    return rows


def measure_stages(bench: Bench, config, run) -> dict:
    """Everything notebook 10 shows; returns the metrics of `run`."""
    rows = _started(bench, config)
    for stage, share in (("healed", 0.0), ("end to end", config.learning_share)):
        trained = config.changed(router_share=share)
        folder = run.folder / stage.replace(" ", "-")
        with closing(train(bench, stage, trained, folder)) as variant:
            rows += _at_budgets(bench, variant, stage, config.budgets)
    return run.finish(rows, gains=gains(bench, config.budgets))
