"""Warm start: regress the router on each token's marginal harm. With `router_share=0` that is all.

The marginal harm of a unit for a token is what skipping it adds to that token's KL from the dense
model, on top of a background plan. Round 1 uses random plans or the best static plan as background;
later rounds use the router's own plan at the target skip, with some gates flipped, so that the
labels are right where it will work (as in DAgger, Ross et al. 2011).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dlr.measure.likelihood import cross_entropy, frozen_base, kl_to_teacher
from dlr.progress import tqdm
from dlr.routing.budget import threshold_for
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.plan import static_pair
from dlr.routing.policy import GivenPlan, RouterPolicy, refuse_without_plan
from dlr.routing.router import hard_gates
from dlr.runs import save_tensors
from dlr.train.settings import RunConfig

FLIPPED = 0.1                            # share of gates flipped in the router's background plans
SHARES = (0.02, 0.1, 0.25, 0.5, 1.0)     # of token-dependence, on top of the best static plan
SHRINK_BATCHES = 4                       # batches of training text that choose among them
LOGIT_SCALE = 2.0                        # spread of the logits a warm router starts with


@dataclass
class HarmLabels:
    """Of n predicted tokens: states `[n, d]` before layer K, marginal harms `[n, U]` in nats."""
    states: torch.Tensor
    harm: torch.Tensor


class Background:
    """Plans `[b, s, U]` to flip units in: random ones, a static one, or (later) the router's."""

    def __init__(self, routing: Routing, target: float, round_index: int,
                 order: list[int] | None, seed: int):
        self.routing, self.target, self.order = routing, target, order
        self.is_routers = round_index > 0
        self.generator = torch.Generator().manual_seed(1000 * seed + round_index)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (*hidden.shape[:2], self.routing.units)
        draw = torch.rand(shape, generator=self.generator).to(hidden.device)
        if not self.is_routers and self.order is None:
            rate = torch.rand(shape[0], 1, 1, generator=self.generator) * min(1.0, 2 * self.target)
            return (draw >= rate.to(hidden.device)).float()
        if self.is_routers:
            gates = hard_gates(self.routing.router(hidden), self.routing.threshold)
        else:
            *plans, share = static_pair(self.order, self.routing.units, self.target)
            second = torch.rand(shape[0], generator=self.generator) < share
            gates = torch.stack(plans)[second.long()].unsqueeze(1).expand(shape).to(hidden.device)
        return torch.where(draw < FLIPPED, 1 - gates, gates)


@torch.no_grad()
def label_batch(model, routing: Routing, ids: torch.Tensor,
                make_background: Background) -> HarmLabels:
    """Labels of a batch `[b, s]`: a dense pass, a background pass, and one a flipped unit."""
    real = torch.ones_like(ids, dtype=torch.bool)

    def kl_under(gates, teacher):
        with routing.autocast(), routing.using(GivenPlan(gates)):
            return kl_to_teacher(model(input_ids=ids, use_cache=False).logits, teacher, real)

    states = []
    layer = routing.layers[routing.first]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True)
    try:
        with routing.autocast(), frozen_base(model, routing):
            teacher = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    background = make_background(states[-1]).clone()
    background[:, :routing.config.keep_first_tokens] = 1.0
    background_kl = kl_under(background, teacher)
    harms = []
    for unit in range(routing.units):
        flipped = background.clone()
        flipped[..., unit] = 1 - flipped[..., unit]
        ran = background[:, :-1, unit].flatten() > 0.5
        change = kl_under(flipped, teacher) - background_kl
        harms.append(torch.where(ran, change, -change))
    keep = torch.ones_like(ids[:, :-1], dtype=torch.bool)
    keep[:, :routing.config.keep_first_tokens] = False
    rows = keep.flatten()
    return HarmLabels(states[-1][:, :-1].flatten(0, 1)[rows].float().cpu(),
                      torch.stack(harms, -1)[rows].float().cpu())


def label(model, routing: Routing, blocks, config: RunConfig, round_index: int,
          folder: Path | None, order: list[int] | None = None) -> HarmLabels:
    """Labels of one round for about `config.warm_tokens` tokens, cached in `folder`.

    They come from the front of `blocks` and never from the last ones, which `shrink` reads.

    Raises:
        ValueError: there are too few blocks for both.
    """
    path = folder / f"harm-{round_index}.safetensors" if folder else None
    if path and path.exists():
        stored = load_file(path)
        return HarmLabels(stored["states"], stored["harm"])
    usable = len(blocks) - SHRINK_BATCHES * config.batch_size
    if usable < config.batch_size:
        raise ValueError(f"The training text holds {len(blocks)} blocks of {config.seq_len} "
                         f"tokens; a warm start needs {(SHRINK_BATCHES + 1) * config.batch_size}: "
                         "give more text, a smaller batch_size or seq_len, or warm_start=false.")
    background = Background(routing, config.target_skip, round_index, order, config.seed)
    count = -(-config.warm_tokens // (config.batch_size * (config.seq_len - 1)))
    parts = []
    for number in tqdm(range(count), unit="batch",
                       desc=f"labelling marginal harm {round_index + 1}/{config.warm_rounds}"):
        start = (round_index * count + number) * config.batch_size
        places = [place % usable for place in range(start, start + config.batch_size)]
        ids = _batch(blocks, places, model)
        parts.append(label_batch(model, routing, ids, background))
    labels = _joined(parts)
    if path:
        save_tensors({"states": labels.states, "harm": labels.harm}, path)
    return labels


def _batch(blocks, places: list[int], model) -> torch.Tensor:
    """The blocks at `places`, token ids `[b, s]` where the model is."""
    return torch.stack([blocks[place]["input_ids"] for place in places]).to(device_of(model))


def _joined(parts: list[HarmLabels]) -> HarmLabels:
    return HarmLabels(torch.cat([part.states for part in parts]),
                      torch.cat([part.harm for part in parts]))


def regress(routing: Routing, labels: HarmLabels, epochs: int, seed: int) -> float:
    """Fits the router to the labels; returns the share of variance explained on a tenth held out.

    Harms are clipped at their 1st and 99th percentile (a few tokens are hurt a hundred times more
    than the rest) and scaled to the spread of logits; one scale and offset for all units, so that
    one threshold can compare them.
    """
    device = next(routing.router.parameters()).device
    sample = labels.harm.flatten()[::max(1, labels.harm.numel() // 100_000)]
    low, high = torch.quantile(sample, torch.tensor([0.01, 0.99]))
    harm = labels.harm.clamp(low, high)
    goal = ((harm - harm.mean()) / harm.std().clamp(min=1e-8) * LOGIT_SCALE).to(device)
    states = labels.states.to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(states), generator=generator)
    held_out, fitted = order[:len(order) // 10], order[len(order) // 10:]
    optimizer = torch.optim.AdamW(routing.router.net.parameters(), lr=2e-3, weight_decay=0.05)
    total = epochs * -(-len(fitted) // 512)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    routing.router.requires_grad_(True)
    for _ in range(epochs):
        for rows in fitted[torch.randperm(len(fitted), generator=generator)].split(512):
            loss = F.mse_loss(routing.router(states[rows]), goal[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = F.mse_loss(routing.router(states[held_out]), goal[held_out])
    return float(1 - error / goal[held_out].var())


def _thresholded(routing: Routing, states: torch.Tensor, target_skip: float) -> None:
    """Sets the threshold that gives `target_skip` on the labelled tokens."""
    device = next(routing.router.parameters()).device
    with torch.no_grad():
        logits = torch.cat([routing.router(part.to(device)).cpu() for part in states.split(4096)])
    routing.calibration.threshold = threshold_for(logits, target_skip)


@torch.no_grad()
def shrink(model, routing: Routing, blocks, labels: HarmLabels, order: list[int],
           config: RunConfig) -> float:
    """Shrinks the router to the best static plan by the share of token-dependence that pays.

    Marginal harms do not add up: layers that are each spare may not be spare together, which a plan
    put together token by token ignores and the greedy search does not. So the logits become
    `prior[u] + share * (logit[u] - mean[u])`, the prior falling along the static order. The share,
    which is returned, gives the least loss on training text that was not labelled. At the smallest
    one all but the boundary layer is static, and tokens choose that one.
    """
    last = routing.router.net[-1]
    device = device_of(model)
    logits = [routing.router(part.to(device)) for part in labels.states.split(4096)]
    mean = torch.cat(logits).mean(0)
    rank = torch.tensor(order, device=device).argsort()
    prior = LOGIT_SCALE * (2 * rank / max(1, routing.units - 1) - 1)
    weight, bias = last.weight.clone(), last.bias.clone()
    size = config.batch_size
    first = len(blocks) - SHRINK_BATCHES * size        # labels come from the front
    starts = range(first, len(blocks), size)
    batches = [_batch(blocks, list(range(start, start + size)), model) for start in starts]

    def set_share(share: float) -> None:
        last.weight.copy_(share * weight)
        last.bias.copy_(prior + share * (bias - mean))
        _thresholded(routing, labels.states, config.target_skip)

    def loss(ids: torch.Tensor) -> float:
        logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits, ids, torch.ones_like(ids, dtype=torch.bool)).sum().item()
    losses = {}
    for share in tqdm(SHARES, desc="how much token-dependence pays", unit="share"):
        set_share(share)
        with routing.autocast(), routing.using(RouterPolicy()):
            losses[share] = sum(map(loss, batches))
    best = min(losses, key=losses.get)
    set_share(best)
    return best


def warm_start(model, routing: Routing, blocks, config: RunConfig, folder: Path | None = None,
               order: list[int] | None = None) -> dict:
    """Labels, regresses and sets the threshold, `config.warm_rounds` times; returns what it found.

    With `order` (see `measure.static.greedy_static_order`) the first backgrounds are that static
    plan at the target skip, and the router is shrunk towards it at the end.
    """
    refuse_without_plan(routing, "warm_start")
    routing.bf16 = config.autocast
    explained = []
    pool = []
    for round_index in range(config.warm_rounds):
        pool.append(label(model, routing, blocks, config, round_index, folder, order))
        labels = _joined(pool)
        explained.append(regress(routing, labels, config.warm_epochs, config.seed))
        _thresholded(routing, labels.states, config.target_skip)
    notes = {"warm_start_explained_variance": explained}
    if order is not None:
        notes["token_dependent_share"] = shrink(model, routing, blocks, labels, order, config)
    return notes
