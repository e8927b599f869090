"""What each part of a depth router's start is worth on a base that is not healed; notebook 09."""

import copy

import torch

from dlr.base.data import load_documents
from dlr.measure.depth import Predictor, depth_rows, plans_at, realised, token_table
from dlr.measure.evaluate import calibrate_router
from dlr.measure.labels import HarmLabels, label_in_context
from dlr.progress import tqdm
from dlr.routing.attach import attach
from dlr.routing.router import router_class
from dlr.train.prepare import context_batches
from dlr.train.regress import MOVED, regress
from dlr.workbook.domain_study import static_by_domain
from dlr.workbook.study import Bench


def predictor(router, privileged: bool = False) -> Predictor:
    """The harms that `router` predicts; a privileged one is fed the dense model's last state."""
    @torch.no_grad()
    def predict(labels: HarmLabels) -> torch.Tensor:
        states, device = labels.last if privileged else labels.states, router.center.device
        return torch.cat([router.harm(part.to(device), place.to(device)).cpu() for part, place in
                          zip(states.split(4096), labels.position.split(4096))])
    return predict


def fitted(routing, labels: HarmLabels, config, name: str = "", privileged: bool = False):
    """(a fresh router like `routing`'s, or of the class `name`, regressed; deviance explained)."""
    kind = router_class(name or config.router_class)
    torch.manual_seed(config.seed)
    router = kind(routing.router.width, routing.units, routing.config)
    router.to(routing.router.center.device)
    router.set_order(routing.router.order.tolist())
    if privileged:
        labels = copy.copy(labels)
        labels.states = labels.last
    return router, regress(router, labels, config.visits, config.seed)


def scaling(routing, labels: HarmLabels, test: HarmLabels, config) -> list[dict]:
    """KL of the plans that routers from ever more labels choose, by the harms of shared plans."""
    rows = []
    for count in sorted({min(count, len(labels)) for count in config.label_counts}):
        spread = torch.linspace(0, len(labels) - 1, count).long()
        router, explained = fitted(routing, labels[spread], config)
        harm = predictor(router)(test)
        for budget in config.budgets:
            plan = plans_at(harm, routing.router.depths.cpu(), budget,
                            routing.units)
            kl = test.harm.gather(1, plan.unsqueeze(1)).mean()
            rows.append({"labels": count, "budget": budget, "kl": float(kl),
                         "explained": explained})
    return rows


def measure(bench: Bench, config, run) -> dict:
    """Everything notebook 09 shows; returns the metrics of `run`."""
    preparation = bench.preparation(config, labels=True)
    labels = preparation.labels
    routing = attach(bench.base, config.router(), bf16=config.autocast)
    try:
        preparation.install(routing)
        router, explained = fitted(routing, labels, config)
        routing.router.load_weights(router.weights() | routing.router.adapters())
        calibrate_router(bench.base, routing, bench.calibration, config.target_skip)
        predictors = {"depth router": predictor(router)}
        notes = {"explained": {"depth router": explained}}
        extra = context_batches(bench.tokenizer, config)
        if extra:
            generator = torch.Generator().manual_seed(config.seed)
            parts = [label_in_context(bench.base, routing, batch, MOVED, generator)
                     for batch in tqdm(extra, desc="labelling in context", unit="batch")]
            both = HarmLabels.joined([labels, *parts])
            router, notes["explained"]["in context"] = fitted(routing, both, config)
            predictors["in context"] = predictor(router)
        blind, notes["explained"]["position alone"] = fitted(routing, labels, config,
                                                             "PositionRouter")
        predictors |= {"position alone": predictor(blind), "token alone": token_table(labels)}
        if config.privileged:
            seeing, explained = fitted(routing, labels, config, privileged=True)
            notes["explained"]["privileged"] = explained
            predictors["privileged"] = predictor(seeing, privileged=True)
        table, truth = realised(bench.base, routing, bench.test, predictors, config.budgets)
        if load_documents(config.dataset, "test").domains:
            table = table.merge(static_by_domain(bench, routing, config))
        test = HarmLabels.joined(truth[:config.scaling_batches])
        counts = scaling(routing, labels, test, config)
    finally:
        routing.detach()
    return run.finish(depth_rows(table), order=preparation.order, labels=len(labels),
                      depths=[int(depth) for depth in routing.router.depths.tolist()],
                      scaling=counts, **notes)
