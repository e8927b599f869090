"""How much a per-token plan could save: KL of greedy oracle, best static plan and router.

**The oracle.** It starts from full depth. Every round measures, for every token and every layer it
still runs, the KL from the dense model if that layer were skipped too. The least harmful layer is
each token's candidate, and the cheapest candidates of all tokens are taken (one price for all),
until the budget is met. It sees the dense model's next-token distribution, which no router does,
but not the next token. Harms are measured with all tokens' candidates at once: a skipped token
still leaves keys and values, so tokens disturb one another little. What is reported is the KL of
the finished plan run as a whole, never a sum of harms. A greedy plan is not the best one, so it
bounds the headroom from below.

**The best static plan** here is the same greedy search with one vector for all tokens, on other
(calibration) text.

Notation: b batch, s sequence, U routable units, n tokens that choose: those with a next token, kept
first tokens left out. Skip ratios here are over these n tokens, for all plans alike. All KL and
losses are in nats.
"""

import numpy as np
import pandas as pd
import torch

from dlr.measure.evaluate import bootstrap
from dlr.measure.instrument import Instrument, router_plan
from dlr.measure.static import greedy_order
from dlr.progress import tqdm
from dlr.routing.plan import skip_ratio, static_gates, static_pair

ROUNDS_PER_UNIT = 2       # rounds in which the plan as a whole loses one unit a token


def static_order(instruments: list[Instrument]) -> list[int]:
    """The greedy order by KL: each time the unit whose absence adds least; U (U + 3) / 2 passes."""
    units = instruments[0].routing.units

    def harms(dropped, left):
        plans = [instrument.sample.spread(static_gates(units, dropped))
                 for instrument in instruments]
        for instrument, gates in zip(instruments, plans):
            instrument.base(gates)
        for unit in left:
            yield sum(instrument.without(gates, unit)[0].sum()
                      for instrument, gates in zip(instruments, plans))

    return greedy_order(units, harms)


def greedy_oracle(instruments: list[Instrument],
                  skips: list[float]) -> dict[float, list[torch.Tensor]]:
    """The per-token plans, gates `[n, U]` bool a sample, at each of `skips` of the choosing tokens.

    About 2 U (U + 1) max(skips) passes a sample; most run only the layers after the unit measured.
    """
    units = instruments[0].routing.units
    plans = [torch.ones(len(instrument.sample), units, dtype=torch.bool)
             for instrument in instruments]
    total = sum(plan.numel() for plan in plans)
    round_size = max(1, total // (units * ROUNDS_PER_UNIT))
    goals = {skip: round(skip * total) for skip in sorted(skips)}
    at_skip = {}
    closed = 0
    with tqdm(total=max(goals.values()), desc="per-token oracle", unit="gate") as bar:
        for skip, goal in goals.items():
            while closed < goal:
                taken = _close_cheapest(instruments, plans, min(round_size, goal - closed))
                if not taken:
                    raise ValueError(f"The oracle has nothing left to close at a skip of {skip}: "
                                     "KL values are undefined, so the model's logits are not "
                                     "finite on this sample.")
                closed += taken
                bar.update(taken)
            at_skip[skip] = [plan.clone() for plan in plans]
    return at_skip


def _close_cheapest(instruments: list[Instrument], plans: list[torch.Tensor], count: int) -> int:
    """Closes the `count` cheapest candidate units of all tokens, in place; returns how many."""
    costs, units = [], []
    for instrument, plan in zip(instruments, plans):
        gates = instrument.sample.spread(plan)
        kl, _ = instrument.base(gates)
        harm = torch.stack([instrument.without(gates, unit)[0] - kl if plan[:, unit].any() else kl
                            for unit in range(plan.shape[1])], -1)
        cost, cheapest = harm.masked_fill(~plan, float("inf")).min(-1)
        costs.append(cost)
        units.append(cheapest)
    prices = torch.cat(costs)
    chosen = torch.zeros(len(prices), dtype=torch.bool)
    chosen[prices.argsort(stable=True)[:count]] = True
    chosen &= prices.isfinite()
    for plan, cheapest, closing in zip(plans, units, chosen.split([len(plan) for plan in plans])):
        plan[closing, cheapest[closing]] = False
    return int(chosen.sum())


def headroom(instruments: list[Instrument], order: list[int],
             thresholds: dict[float, float]) -> tuple[pd.DataFrame,
                                                      dict[float, list[torch.Tensor]]]:
    """KL of oracle, best static plan and router at the router's own measured skips.

    Args:
        order: the static plan's, found on other text.
        thresholds: the router's threshold for each budget asked for.

    Returns:
        One row a budget and document (budget, document, tokens, skip, and summed KL as static,
        routed, oracle), and the oracle's plans by budget. Where the greedy plan is worse than the
        static one, the static one's KL counts as the oracle's.
    """
    routed = {budget: [router_plan(instrument, threshold) for instrument in instruments]
              for budget, threshold in thresholds.items()}
    skips = {budget: skip_ratio(torch.cat(plans)) for budget, plans in routed.items()}
    oracle = greedy_oracle(instruments, sorted(set(skips.values())))
    frames = []
    for budget, skip in skips.items():
        pair = static_pair(order, len(order), skip)
        for number, instrument in enumerate(instruments):
            def kl(plan):
                return instrument.base(instrument.sample.spread(plan))[0]

            frames.append(pd.DataFrame({
                "budget": budget, "skip": skip, "document": instrument.sample.document.numpy(),
                "tokens": 1, "static": pair.mean(kl(pair.fewer), kl(pair.more)).double().numpy(),
                "routed": kl(routed[budget][number]).double().numpy(),
                "oracle": kl(oracle[skip][number]).double().numpy()}))
    table = pd.concat(frames).groupby(["budget", "skip", "document"], as_index=False).sum()
    totals = table.groupby("budget")[["oracle", "static"]].transform("sum")
    table["oracle"] = table["oracle"].where(totals["oracle"] <= totals["static"], table["static"])
    return table, {budget: oracle[skip] for budget, skip in skips.items()}


def captured(table: pd.DataFrame) -> float:
    """The router's share of the oracle's gain over the static plan; negative: worse than static."""
    return float(_captured(table[["static", "routed", "oracle"]].sum()))


def _captured(sums) -> np.ndarray:
    """NaN where the oracle gains nothing."""
    room = np.asarray(sums["static"] - sums["oracle"], dtype=np.float64)
    return (sums["static"] - sums["routed"]) / np.where(room > 0, room, np.nan)


def headroom_rows(table: pd.DataFrame) -> list[dict]:
    """One row a budget: mean KL a token of each plan, and the captured fraction with interval."""
    rows = []
    for budget, group in table.groupby("budget"):
        means = {name: float(group[name].sum() / group["tokens"].sum())
                 for name in ("static", "routed", "oracle")}
        low, high = bootstrap(group[["static", "routed", "oracle"]], _captured)
        rows.append({"budget": float(budget), "skip": float(group["skip"].iloc[0]), **means,
                     "captured": captured(group), "captured_low": low, "captured_high": high,
                     "documents": len(group), "tokens": int(group["tokens"].sum())})
    return rows
