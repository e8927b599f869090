"""The controls every routed result stands beside: static plans and how the best one is found."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from dlr.measure.evaluate import evaluate
from dlr.measure.instrument import open_sample
from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import last_only
from dlr.measure.static_runs import StaticRuns
from dlr.processes import agreed, dealt, is_first
from dlr.progress import tqdm
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.plan import static_gates, static_pair
from dlr.routing.policy import StaticPlan
from dlr.runs import write_atomically


def greedy_order(units: int, harms: Callable[[list[int], list[int]], Iterable[float]],
                 candidates: int = 0, kept: Path | None = None) -> list[int]:
    """The units a static plan drops, first to last: each time the one whose loss does least harm.

    Args:
        harms: given the units dropped so far and those to try, the harm of dropping each of the
            latter too. It is asked for U (U + 1) / 2 harms in all.
        candidates: how many units a round tries, those that added least harm when they were last
            tried; 0: all. Ten make the search linear in U.
        kept: a file that is written after each round, and that an interrupted search goes on from.
    """
    dropped: list[int] = []
    added = dict.fromkeys(range(units), 0.0)
    level = 0.0
    if kept is not None and agreed(kept.is_file()):
        dropped, left, level = agreed(json.loads(kept.read_text(encoding="utf-8"))
                                      if is_first() else None)
        added = {int(unit): harm for unit, harm in left.items()}
    tried = [units if not place else min(units - place, candidates or units)
             for place in range(units)]
    with tqdm(total=sum(tried), initial=sum(tried[:len(dropped)]), desc="best static plan",
              unit="plan") as bar:
        for count in tried[len(dropped):]:
            units_to_try = sorted(sorted(added, key=added.get)[:count])
            for unit, harm in zip(units_to_try, harms(dropped, units_to_try)):
                added[unit] = float(harm) - level
                bar.update()
            dropped.append(min(units_to_try, key=added.get))
            level += added.pop(dropped[-1])
            if kept is not None and is_first():
                write_atomically(kept, json.dumps([dropped, added, level]))
    return dropped


def greedy_order_by_kl(model, routing: Routing, batches: list[dict],
                       candidates: int = 10, kept: Path | None = None) -> list[int]:
    """The greedy order by KL from the dense model on `batches`; a thousand tokens suffice.

    KL is far less noisy than the loss: it compares whole distributions on the same tokens.
    `candidates` and `kept` are those of `greedy_order`. Several processes share a round's units.
    """
    runs = [StaticRuns(model, routing, open_sample(model, routing, batch)) for batch in batches]

    def harms(dropped, left):
        for run in runs:
            run.kl(static_gates(routing.units, dropped), keep=True)

        def harm(unit):
            gates = static_gates(routing.units, [*dropped, unit])
            return float(sum(run.kl(gates).sum() for run in runs))
        return dealt(left, harm)

    return greedy_order(routing.units, harms, candidates, kept)


@torch.no_grad()
def similarity_order(model, routing: Routing, batches: list[dict]) -> list[int]:
    """Units from the least block influence to the greatest, by one dense pass over `batches`.

    ShortGPT's order (Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant
    Than You Expect"): a layer's influence is 1 - the cosine of its input and its output, here the
    mean over the tokens that choose.

    Raises:
        ValueError: units are sublayers, which have no output state of their own.
    """
    if routing.units_per_layer != 1:
        raise ValueError("Block influence is a whole layer's; this router has unit='sublayer'. Use "
                         "unit='layer'.")
    influence = torch.zeros(routing.units, dtype=torch.float64)
    chooses = None

    def watched(unit: int):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, (tuple, list)) else output
            near = F.cosine_similarity(before.float(), after.float(), dim=-1)
            influence[unit] += float((1 - near)[chooses.to(near.device)].sum())
        return hook

    layers = routing.layers[routing.first:routing.last]
    handles = [layer.register_forward_hook(watched(unit), with_kwargs=True)
               for unit, layer in enumerate(layers)]
    try:
        for batch in batches:
            ids, mask = (batch[name].to(device_of(model)) for name in ("input_ids",
                                                                       "attention_mask"))
            chooses = mask.bool() & (mask.cumsum(1) > routing.config.keep_first_tokens)
            with routing.autocast(), frozen_base(model, routing):
                model(input_ids=ids, attention_mask=mask, use_cache=False, **last_only(model))
    finally:
        for handle in handles:
            handle.remove()
    return influence.argsort(stable=True).tolist()


def plan_without(routing: Routing, layers: list[int]) -> StaticPlan:
    """The static plan that leaves out `layers`, counted from the model's first one, 0.

    Raises:
        ValueError: one of them is not routable, or is named twice.
    """
    routable = range(routing.first, routing.last)
    if len(set(layers)) < len(layers) or not set(layers) <= set(routable):
        raise ValueError(f"A plan leaves out layers {routable.start} to {routable.stop - 1} of "
                         f"this router, each once; {layers} was given.")
    each = range(routing.units_per_layer)
    units = [(layer - routing.first) * len(each) + part for layer in layers for part in each]
    return StaticPlan(static_gates(routing.units, units))


def order_of_mean_plan(keep_rate: list[float]) -> list[int]:
    """Units from the one a router keeps least to the one it keeps most: its nearest static plan."""
    return sorted(range(len(keep_rate)), key=keep_rate.__getitem__)


def forced_share(batches: list[dict], keep_first_tokens: int) -> float:
    """Share of the batches' tokens that run every layer because they open a document."""
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    return float(lengths.clamp(max=keep_first_tokens).sum() / lengths.sum())


def evaluate_static(model, routing: Routing, batches: list[dict], order: list[int], skip: float,
                    forced: float) -> pd.DataFrame:
    """The document table of the static plan along `order` at exactly `skip`: mean of two plans."""
    pair = static_pair(order, routing.units, skip, forced)
    return pair.mean(*(evaluate(model, routing, batches, StaticPlan(plan)) for plan in pair[:2]))
