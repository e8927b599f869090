"""Who should get depth: what predictors of a book's harms are worth, on a base that is not healed.

Every predictor gives each token the plan of least predicted harm + price * units run, at the price
that skips exactly as much as is asked for on this very sample, so that all are compared at the same
skip. `realised` runs the tokens with their different plans in one pass, which is what counts; a
token's harm under a plan that all tokens share is only an estimate of it.

Notation: n tokens that choose, M plans of the book, U routable units. KL in nats.
"""

from collections.abc import Callable

import pandas as pd
import torch

from dlr.measure.evaluate import bootstrap
from dlr.measure.instrument import costs
from dlr.measure.labels import HarmLabels, label_sample, open_for_labels
from dlr.measure.oracle import captured
from dlr.progress import tqdm
from dlr.routing.book import prices
from dlr.routing.handle import Routing
from dlr.routing.policy import GivenPlan

Predictor = Callable[[HarmLabels], torch.Tensor]      # to harms [n, M]


def plans_at(harm: torch.Tensor, depths: torch.Tensor, skip: float, units: int) -> torch.Tensor:
    """The plan `[n]` of each token by harms `[n, M]`, at the price that skips `skip` of the units.

    One price hardly ever gives exactly that; of the steps at that price, as many are taken as are
    needed.
    """
    slopes = prices(harm, depths)
    sizes = depths.diff().expand_as(slopes)
    order = slopes.flatten().argsort(stable=True)
    within = sizes.flatten()[order].cumsum(0) <= skip * units * len(harm)
    taken = torch.zeros(slopes.numel(), dtype=torch.bool)
    taken[order[within]] = True
    return taken.view_as(slopes).long().cumprod(1).sum(1)


def static_mixture(harm: torch.Tensor, depths: torch.Tensor, skip: float,
                   units: int) -> torch.Tensor:
    """Expected harm `[n]` of the best mixture of two of the book's plans at a skip."""
    mean, asked = harm.mean(0), skip * units
    best = None
    for fewer in range(len(depths)):
        for more in range(len(depths)):
            if depths[fewer] <= asked <= depths[more]:
                width = float(depths[more] - depths[fewer])
                share = (asked - float(depths[fewer])) / width if width else 0.0
                value = float((1 - share) * mean[fewer] + share * mean[more])
                if best is None or value < best[0]:
                    best = value, fewer, more, share
    if best is None:
        raise ValueError(f"A skip of {skip} lies beyond the book, whose deepest plan drops "
                         f"{float(depths[-1]) / units:.0%}; raise book_depth.")
    _, fewer, more, share = best
    return (1 - share) * harm[:, fewer] + share * harm[:, more]


@torch.no_grad()
def realised(model, routing: Routing, batches: list[dict], predictors: dict[str, Predictor],
             budgets: list[float]) -> tuple[pd.DataFrame, list[HarmLabels]]:
    """Summed KL of each document under the static book and under each predictor's plans.

    Args:
        predictors: beside them 'oracle' reads the true harms, and 'shuffled' deals out the plans
            of the first predictor anew.

    Returns:
        One row a budget and document (tokens, static, oracle, shuffled, and each predictor), and
        the true labels of each batch.
    """
    depths, units = routing.router.depths.cpu(), routing.units
    book = routing.router.gates.cpu()
    samples = [open_for_labels(model, routing, batch) for batch in batches]
    parts = [label_sample(model, routing, sample)
             for sample in tqdm(samples, desc="true harms", unit="batch")]
    truth = HarmLabels.joined(parts)
    harms = {name: predict(truth) for name, predict in predictors.items()}
    harms["oracle"] = truth.harm
    frames = []
    with tqdm(total=len(budgets) * (len(harms) + 1) * len(samples), desc="plans as a whole",
              unit="pass") as bar:
        for budget in budgets:
            plans = {name: plans_at(harm, depths, budget, units) for name, harm in harms.items()}
            first = plans[next(iter(plans))]
            shuffle = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))
            plans["shuffled"] = first[shuffle]
            kl = {}
            for name, plan in plans.items():
                rows = []
                for sample, own in zip(samples, plan.split([len(each) for each in samples])):
                    with routing.autocast():
                        rows.append(costs(model, routing, sample,
                                          GivenPlan(sample.spread(book[own])))[0])
                    bar.update()
                kl[name] = torch.cat(rows).double().numpy()
            kl["static"] = static_mixture(truth.harm, depths, budget, units).double().numpy()
            frames.append(pd.DataFrame({"budget": budget, "document": truth.document.numpy(),
                                        "tokens": 1, **kl}))
    return pd.concat(frames).groupby(["budget", "document"], as_index=False).sum(), parts


def depth_rows(table: pd.DataFrame) -> list[dict]:
    """One row a budget and plan: KL a token with interval, difference from static, captured share.
    """
    names = [name for name in table if name not in ("budget", "document", "tokens")]
    rows = []
    for budget, group in table.groupby("budget"):
        for name in names:
            def kl(sums, _name=name):
                return sums[_name] / sums["tokens"]

            def against(sums, _name=name):
                return (sums[_name] - sums["static"]) / sums["tokens"]

            whole = group.sum()
            low, high = bootstrap(group, kl)
            below, above = bootstrap(group, against)
            room = group.assign(routed=group[name])
            rows.append({"budget": float(budget), "plan": name, "kl": float(kl(whole)), "low": low,
                         "high": high, "difference": float(against(whole)),
                         "difference_low": below, "difference_high": above,
                         "captured": captured(room), "documents": len(group),
                         "tokens": int(group["tokens"].sum())})
    return rows


def token_table(labels: HarmLabels, strength: float = 8.0) -> Predictor:
    """Harm by token id alone: its mean over the labels, shrunk to the mean of all by `strength`."""
    mean = labels.harm.mean(0)
    ids = labels.token.long()
    size = int(ids.max()) + 1
    total = torch.zeros(size, labels.harm.shape[1]).index_add_(0, ids, labels.harm)
    count = torch.bincount(ids, minlength=size).unsqueeze(1)
    table = (total + strength * mean) / (count + strength)

    def predict(given: HarmLabels) -> torch.Tensor:
        known = given.token.long().clamp(max=size - 1)
        return torch.where((given.token < size).unsqueeze(1), table[known], mean)
    return predict
