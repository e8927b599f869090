"""Fits a depth router to harm labels: Poisson regression of each plan's harm.

Harms are positive, heavy-tailed and multiplicative, for which a Poisson likelihood is a consistent
fit of the mean (Gourieroux, Monfort and Trognon 1984). It measured better than squared error.
"""

import torch
import torch.nn.functional as F

from dlr.measure.evaluate import calibrate_router
from dlr.measure.labels import HarmLabels, label_in_context
from dlr.progress import tqdm
from dlr.train.settings import RunConfig

BATCH = 512
DROPOUT = 0.2
TOP = 0.99           # quantile that harms are cut at: a few tokens are hurt a hundred times more
HELD_OUT = 20        # one token in so many is left out, to report on
EPOCHS = 13          # visits of one label at most: of few labels, more are learnt by heart
MOVED = 0.3          # share of the tokens that leave the router's plan in context


def targets(harm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(harms of plans 1 to M - 1 cut at their upper quantile, their means `[M - 1]`)."""
    harm = harm[:, 1:]
    sample = harm[torch.linspace(0, len(harm) - 1, min(len(harm), 100_000)).long()]
    cut = torch.minimum(harm, torch.nanquantile(sample, TOP, dim=0)).clamp(min=0)
    return cut, cut.nanmean(0).clamp(min=1e-6)


def regress(router, labels: HarmLabels, visits: int, seed: int) -> float:
    """Fits `router`, a `DepthRouter`, in place.

    Args:
        visits: labels looked at in all, each of them EPOCHS times at most.

    Returns:
        The share of the Poisson deviance explained on tokens left out.
    """
    device = router.center.device
    states, position = labels.states.to(device), labels.position.to(device)
    goal, mean = targets(labels.harm)
    goal, known = (goal / mean).nan_to_num().to(device), ~labels.harm[:, 1:].isnan().to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held_out, fitted = order[:len(order) // HELD_OUT], order[len(order) // HELD_OUT:]
    with torch.no_grad():
        sample = fitted[:20_000]
        router.set_inputs(router.inputs(states[sample], position[sample]))
        router.net[-1].bias.copy_(mean.log())
    offset = mean.log().to(device)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        log_harm = router.log_harm(states[rows], position[rows]) - offset
        nll = F.poisson_nll_loss(log_harm, goal[rows], reduction="none")
        return nll[known[rows]].mean()

    _minimise(router, loss, fitted, min(visits, EPOCHS * len(labels)), generator)
    with torch.no_grad():
        deviance = torch.stack([loss(rows) for rows in held_out.split(4096)]).mean()
        flat = F.poisson_nll_loss(torch.zeros_like(goal), goal, reduction="none")[held_out]
        best = (goal - goal.clamp(min=1e-9).log() * goal)[held_out]
        known = known[held_out]
    return float(1 - (deviance - best[known].mean()) / (flat[known].mean() - best[known].mean()))


def _minimise(router, loss, rows: torch.Tensor, visits: int, generator) -> None:
    parameters = list(router.net.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    steps = max(1, visits // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    router.dropout = DROPOUT
    queue = torch.empty(0, dtype=torch.long)
    try:
        for _ in tqdm(range(steps), desc="regressing harm", unit="step"):
            if len(queue) < BATCH:
                queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=generator)]])
            batch, queue = queue[:BATCH], queue[BATCH:]
            optimizer.zero_grad()
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        router.dropout = 0.0


def start(model, routing, labels: HarmLabels, calibration: list[dict], config: RunConfig,
          context: list[dict] | None = None) -> dict:
    """Regresses and calibrates a depth router whose book and adapters are in place.

    Args:
        labels: under every plan of the book. calibration: held-out batches.
        context: batches to label in context, under the router that the labels gave; the regression
            is then made anew on both.

    Returns:
        The shares of deviance explained, before and after that round.
    """
    explained = [regress(routing.router, labels, config.visits, config.seed)]
    calibrate_router(model, routing, calibration, config.target_skip)
    if context:
        generator = torch.Generator().manual_seed(config.seed)
        parts = [label_in_context(model, routing, batch, MOVED, generator)
                 for batch in tqdm(context, desc="labelling in context", unit="batch")]
        labels = HarmLabels.joined([labels, *parts])
        explained.append(regress(routing.router, labels, config.visits, config.seed))
        calibrate_router(model, routing, calibration, config.target_skip)
    return {"deviance_explained": explained}
