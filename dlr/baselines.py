"""The controls every routed result stands beside: static plans and how the best one is found."""

import torch

from dlr.evaluate import evaluate, mix
from dlr.policy import StaticPlan
from dlr.progress import tqdm
from dlr.routed import Routing


def greedy_static_order(model, routing: Routing, batches: list[dict], *, bf16: bool | None = None) -> list[int]:
    """The units a static plan drops, first to last: each time the one whose loss raises perplexity least.

    Costs U (U + 1) / 2 evaluations of `batches`; unit indices are places among the routable units.
    """
    dropped: list[int] = []
    left = set(range(routing.units))
    with tqdm(total=len(left) * (len(left) + 1) // 2, desc="best static plan", unit="plan") as bar:
        while left:
            losses = {}
            for unit in sorted(left):
                policy = StaticPlan(drop(routing.units, [*dropped, unit]))
                losses[unit] = evaluate(model, routing, batches, policy, bf16=bf16, bar=False)["nll"].sum()
                bar.update()
            dropped.append(min(losses, key=losses.get))
            left.remove(dropped[-1])
    return dropped


def drop(units: int, dropped: list[int]) -> torch.Tensor:
    """The static gate vector `[U]` that drops the given units."""
    gates = torch.ones(units)
    gates[dropped] = 0.0
    return gates


def static_pair(order: list[int], units: int, skip: float, forced: float = 0.0) -> tuple:
    """Two neighbouring static plans along `order` and the share of the second, whose mean skip ratio is `skip`.

    `forced` is the share of tokens that run everything whatever the plan (kept first tokens).

    Returns:
        (gates `[U]`, gates `[U]`, share of the second)

    Raises:
        ValueError: no static plan skips as much.
    """
    exact = skip * units / (1 - forced)
    if units < exact < units * (1 + 1e-6):                # a router that closes every gate, but for rounding
        exact = float(units)
    if not 0 <= exact <= units:
        raise ValueError(f"A skip ratio of {skip} needs {exact:.2f} units dropped; this model has {units}.")
    whole = min(int(exact), units - 1)
    return drop(units, order[:whole]), drop(units, order[:whole + 1]), exact - whole


def order_of_mean_plan(keep_rate: list[float]) -> list[int]:
    """Units from the one the router keeps least to the one it keeps most: the static plan nearest to a router's mean."""
    return sorted(range(len(keep_rate)), key=lambda unit: keep_rate[unit])


def evaluate_static(model, routing: Routing, batches: list[dict], order: list[int], skip: float, forced: float, *,
                    bf16: bool | None = None):
    """The document table of the static plan along `order` at exactly `skip`, mixing two neighbouring plans."""
    fewer, more, share = static_pair(order, routing.units, skip, forced)
    tables = [evaluate(model, routing, batches, StaticPlan(plan), bf16=bf16) for plan in (fewer, more)]
    return mix(*tables, share)
