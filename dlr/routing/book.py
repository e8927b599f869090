"""A nested book: the plans a depth router chooses from, each dropping what the one before drops.

Notation: U routable units, M plans of the book. Plan 0 runs everything. Who gets depth is what
matters; a free choice of which layers to drop gained nothing measurable over the prefixes of one
good static order.
"""

import torch


def depths_of(units: int, plans: int, deepest: float) -> list[int]:
    """How many units each plan of a book drops: at most `plans` numbers, evenly from 0 upwards.

    Args:
        deepest: share of the units that the last plan drops.
    """
    last = max(1, min(units, round(deepest * units)))
    count = min(plans, last + 1)
    return [round(last * place / (count - 1)) for place in range(count)]


def steps_of(order: list[int], depths: list[int]) -> list[int]:
    """For each unit the first plan, less one, that drops it; M - 1 where every plan runs it.

    Args:
        order: the units as a static plan drops them, first to last.
    """
    steps = [len(depths) - 1] * len(order)
    for plan in range(1, len(depths)):
        for unit in order[depths[plan - 1]:depths[plan]]:
            steps[unit] = plan - 1
    return steps


def book_gates(steps: torch.Tensor, plans: int) -> torch.Tensor:
    """The book's plans `[M, U]`, 1 = run, from the steps `[U]` of its units."""
    return (torch.arange(plans, device=steps.device).unsqueeze(1) <= steps).float()


def prices(harm: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """At which price each of the book's M - 1 steps is worth taking, never falling, in nats a unit.

    At a price p, the plan of the least harm + p * (units run) takes just the steps priced at p or
    below: the prices are the slopes of the harm curve's greatest convex minorant over the number of
    units dropped. So a depth router's plan is a threshold on prices, as any other router's is on
    logits.

    Args:
        harm: `[..., M]` nats under each plan.
        depths: `[M]` units each plan drops, rising.
    """
    plans = harm.shape[-1]
    rise = harm.unsqueeze(-2) - harm.unsqueeze(-1)                  # [..., i, k]: from plan i to k
    run = depths.unsqueeze(-2) - depths.unsqueeze(-1)
    upwards = run > 0
    # `new_full` fills on the device; a tensor made from a number would wait for the host's copy
    never = rise.new_full((), torch.inf)
    slope = (rise / run.where(upwards, run.new_ones(()))).where(upwards, never)
    least = slope.flip(-1).cummin(-1).values.flip(-1)[..., 1:]      # over all plans k > step
    begun = torch.ones(plans, plans - 1, dtype=torch.bool, device=harm.device).triu()
    return least.where(begun, -never).amax(-2)  # over all plans i <= step
