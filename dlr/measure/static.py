"""The controls every routed result stands beside: static plans and how the best one is found."""

from collections.abc import Callable, Iterable

import pandas as pd

from dlr.measure.evaluate import evaluate
from dlr.progress import tqdm
from dlr.routing.handle import Routing
from dlr.routing.plan import static_gates, static_pair
from dlr.routing.policy import StaticPlan


def greedy_order(units: int, harms: Callable[[list[int], list[int]], Iterable[float]]) -> list[int]:
    """The units a static plan drops, first to last: each time the one whose loss does least harm.

    Args:
        harms: given the units dropped so far and those left, the harm of dropping each of the
            latter too. It is asked for U (U + 1) / 2 harms in all.
    """
    dropped: list[int] = []
    left = list(range(units))
    with tqdm(total=units * (units + 1) // 2, desc="best static plan", unit="plan") as bar:
        while left:
            costs = {}
            for unit, harm in zip(left, harms(dropped, left)):
                costs[unit] = float(harm)
                bar.update()
            dropped.append(min(costs, key=costs.get))
            left.remove(dropped[-1])
    return dropped


def greedy_static_order(model, routing: Routing, batches: list[dict]) -> list[int]:
    """The greedy order by perplexity on `batches`, as places among the routable units."""
    def losses(dropped, left):
        for unit in left:
            plan = StaticPlan(static_gates(routing.units, [*dropped, unit]))
            yield evaluate(model, routing, batches, plan, bar=False)["nll"].sum()

    return greedy_order(routing.units, losses)


def order_of_mean_plan(keep_rate: list[float]) -> list[int]:
    """Units from the one a router keeps least to the one it keeps most: its nearest static plan."""
    return sorted(range(len(keep_rate)), key=keep_rate.__getitem__)


def evaluate_static(model, routing: Routing, batches: list[dict], order: list[int], skip: float,
                    forced: float) -> pd.DataFrame:
    """The document table of the static plan along `order` at exactly `skip`: mean of two plans."""
    pair = static_pair(order, routing.units, skip, forced)
    return pair.mean(*(evaluate(model, routing, batches, StaticPlan(plan)) for plan in pair[:2]))
