"""What a router has learnt: which tokens get depth, and whether the plan depends on the token.

All of it is computed from a record (see `record`) and labels of its tokens (see `categories`); no
model runs. Intervals are 95 % percentile bootstrap intervals over documents. Opening tokens, which
run every layer whatever the router says, are left out everywhere.

Notation: n tokens, U routable units. Information is in bits.
"""

import numpy as np
import pandas as pd
import torch
from scipy.stats import entropy, rankdata
from sklearn.metrics import mutual_info_score

from dlr.measure.evaluate import bootstrap
from dlr.measure.record import Record
from dlr.routing.plan import gate_entropy, static_pair

PERMUTATIONS = 200
NATS_A_BIT = np.log(2)
ALWAYS, NEVER = 0.99, 0.01          # keep rates beyond which a unit no longer routes
ONE_PLAN = 0.95                     # a router has collapsed where so many tokens share one plan


def free(record: Record) -> np.ndarray:
    """`[n]` bool: tokens whose plan the router decides."""
    return (record.position >= max(1, record.meta["keep_first_tokens"])).numpy()


def ratio_interval(value: np.ndarray, document: np.ndarray) -> dict:
    """Mean of `value` `[n]`, with its interval over documents (NaN where there are none)."""
    if not len(value):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    sums = pd.DataFrame({"x": value, "n": 1.0}).groupby(document).sum()
    low, high = bootstrap(sums, lambda sums: sums["x"] / sums["n"])
    return {"mean": float(np.mean(value)), "low": low, "high": high}


def by_category(record: Record, table: pd.DataFrame) -> pd.DataFrame:
    """One row a category: tokens, share, depth with interval, losses, keep rates (`keep_0` ...).

    The last row, "all", is every token the router decides for. Losses are means in nats.
    """
    decided = free(record)
    document = record.document.numpy()
    depth = record.active_layers.double().numpy()
    gates = record.gates.double().numpy()
    rows = []
    for name, member in [*table.items(), ("all", np.ones(len(record), bool))]:
        chosen = np.asarray(member, bool) & decided
        interval = ratio_interval(depth[chosen], document[chosen])
        row = {"category": name, "tokens": int(chosen.sum()),
               "share": float(chosen.sum() / decided.sum()), "active_layers": interval.pop("mean"),
               **interval}
        for which in ("loss_dense", "loss_routed"):
            row[which] = float(getattr(record, which)[torch.from_numpy(chosen)].double().nanmean())
        keep = gates[chosen].mean(0) if chosen.any() else np.full(gates.shape[1], np.nan)
        rows.append(row | {f"keep_{unit}": float(rate) for unit, rate in enumerate(keep)})
    return pd.DataFrame(rows)


# -- is the plan a matter of the token? ------------------------------------------------------------
def mutual_information(labels: np.ndarray, depth: np.ndarray, document: np.ndarray | None = None,
                       seed: int = 0) -> dict:
    """Mutual information in bits between a label and the depth, beside what chance would show.

    A sample's mutual information is above zero even where there is none. The baseline shuffles
    depths among each document's tokens (all tokens without `document`), PERMUTATIONS times.

    Returns:
        information, chance (mean of the permutations), chance_high (their 95th percentile), excess
        (information less chance) and explained (the excess as a share of the depth's entropy; 0 for
        a constant depth).
    """
    generator = np.random.default_rng(seed)
    group = np.zeros(len(depth), np.int64) if document is None else document
    by_group = np.argsort(group, kind="stable")
    # integers are counted faster than strings and floats
    labels, depth = (pd.factorize(values)[0] for values in (labels, depth))
    by_chance = []
    for _ in range(PERMUTATIONS):
        shuffled = np.empty_like(depth)
        shuffled[by_group] = depth[np.lexsort((generator.random(len(depth)), group))]
        by_chance.append(mutual_info_score(labels, shuffled) / NATS_A_BIT)
    information = mutual_info_score(labels, depth) / NATS_A_BIT
    chance = float(np.mean(by_chance))
    total = entropy(np.unique(depth, return_counts=True)[1], base=2)
    return {"information": float(information), "chance": chance,
            "chance_high": float(np.percentile(by_chance, 95)), "excess": information - chance,
            "explained": (information - chance) / total if total > 0 else 0.0}


def variance_shares(gates: np.ndarray) -> dict:
    """How the variance of a plan `[n, U]` divides (two-way analysis); the shares add up to 1.

    layers: variance of the units' keep rates, which is all a static plan has.
    tokens: variance of the tokens' mean gates, that is of how many units each runs.
    within: the rest, which units a token runs beyond what its count and the keep rates say.

    All are NaN for a plan that never varies. Noise counts as well: the shares tell how much the
    plan differs between tokens, not whether that serves them (shuffling keeps all three).
    """
    gates = gates.astype(np.float64)
    total = gates.var()
    if total == 0:
        return {"layers": float("nan"), "tokens": float("nan"), "within": float("nan")}
    by_unit, by_token = gates.mean(0), gates.mean(1)
    within = gates - by_unit - by_token[:, None] + gates.mean()
    return {"layers": float(by_unit.var() / total), "tokens": float(by_token.var() / total),
            "within": float((within**2).mean() / total)}


def explained_variance(value: np.ndarray, labels: np.ndarray) -> float:
    """Omega squared (Hays 1963): share of the variance of `value` `[n]` that lies between labels.

    It is corrected for chance: 0 on average where labels say nothing, 1 where they say all. NaN
    where the value never varies.
    """
    codes, distinct = pd.factorize(labels)
    size = len(distinct)
    mean = np.bincount(codes, value) / np.bincount(codes)
    total = ((value - value.mean()) ** 2).sum()
    if total == 0 or len(value) <= size:
        return float("nan")
    inside = ((value - mean[codes]) ** 2).sum()
    error = inside / (len(value) - size)
    return float((total - inside - (size - 1) * error) / (total + error))


def collapse(record: Record) -> dict:
    """Signs that a router has stopped routing.

    They are units that always or never run, the number of plans, the commonest one's share, the
    plans' entropy in bits, mean gate entropy in nats (0: all certain), and flags in words."""
    decided = free(record)
    gates = record.gates.numpy()[decided]
    rate = gates.mean(0)
    plans, counts = np.unique(gates, axis=0, return_counts=True)
    always, never = (rate >= ALWAYS), (rate <= NEVER)
    flags = [name for name, holds in (
        ("one plan for nearly all tokens", counts.max() / counts.sum() >= ONE_PLAN),
        ("every layer always runs", always.all()), ("no routable layer ever runs", never.all()),
        ("no unit is routed by token", (always | never).all())) if holds]
    logits = record.logits[torch.from_numpy(decided)]
    shares = torch.sigmoid(logits - record.meta["threshold"])
    return {"always": np.flatnonzero(always).tolist(), "never": np.flatnonzero(never).tolist(),
            "plans": len(plans), "commonest_plan": float(counts.max() / counts.sum()),
            "plan_entropy_bits": float(entropy(counts, base=2)),
            "gate_entropy_nats": gate_entropy(shares), "flags": flags}


def agreement_with_static(record: Record, order: list[int]) -> float:
    """Share of gates equal to those of the static plan along `order` at the record's own skip."""
    gates = record.gates.numpy()[free(record)].astype(np.float64)
    pair = static_pair(order, gates.shape[1], float(1 - gates.mean()))
    return float(pair.mean(*((gates == plan.numpy()).mean() for plan in pair[:2])))


# -- difficulty, position, context -----------------------------------------------------------------
def rank_correlation(x: np.ndarray, y: np.ndarray, document: np.ndarray) -> dict:
    """Spearman's rank correlation (ranks over all tokens) with its interval over documents.

    NaN where either never varies. Pairs with a NaN and draws without variance are left out.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    a, b = (rankdata(values[known]) / max(1, known.sum()) - 0.5 for values in (x, y))
    moments = pd.DataFrame({"n": 1.0, "a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b})
    sums = moments.groupby(document[known]).sum()

    def pearson(sums):
        spread = (sums["aa"] - sums["a"]**2 / sums["n"]) * (sums["bb"] - sums["b"]**2 / sums["n"])
        spread = np.where(np.asarray(spread) > 1e-18, spread, np.nan)
        return (sums["ab"] - sums["a"] * sums["b"] / sums["n"]) / np.sqrt(spread)

    low, high = bootstrap(sums, pearson)
    return {"correlation": float(pearson(sums.sum())), "low": low, "high": high,
            "tokens": int(known.sum())}


def difficulty(record: Record) -> pd.DataFrame:
    """Rank correlation of active layers with the dense model's loss and with its entropy."""
    decided = free(record)
    depth = record.active_layers.double().numpy()[decided]
    document = record.document.numpy()[decided]
    hardness = {"dense loss": record.loss_dense, "dense entropy": record.entropy_dense}
    rows = []
    for name, value in hardness.items():
        hard = value.double().numpy()[decided]
        rows.append({"measure": name, **rank_correlation(depth, hard, document)})
    return pd.DataFrame(rows)


def benefit_correlations(gates: np.ndarray, benefit: np.ndarray,
                         document: np.ndarray) -> pd.DataFrame:
    """Whether layers run where they help, by rank correlation over tokens.

    Active units are compared with the summed benefit, each gate with its own unit's. Gates and
    benefit are `[n, U]`; a unit's benefit is the loss that skipping it alone adds."""
    pairs = {"all units": (gates.sum(1), benefit.sum(1))}
    pairs |= {f"unit {unit}": (gates[:, unit], benefit[:, unit]) for unit in range(gates.shape[1])}
    return pd.DataFrame([{"measure": name, **rank_correlation(ran.astype(float), gained, document)}
                         for name, (ran, gained) in pairs.items()])


def by_position(record: Record) -> pd.DataFrame:
    """Active layers by place in the text, one row a bucket; each is twice as wide as the last."""
    decided = free(record)
    position = record.position.numpy()[decided]
    document = record.document.numpy()[decided]
    depth = record.active_layers.double().numpy()[decided]
    bucket = np.floor(np.log2(position)).astype(int)
    rows = []
    for power in np.unique(bucket):
        inside = bucket == power
        rows.append({"first": 2**power, "last": min(2**(power + 1) - 1, int(position.max())),
                     "tokens": int(inside.sum()),
                     **ratio_interval(depth[inside], document[inside])})
    return pd.DataFrame(rows)


def same_word(record: Record, least: int = 10) -> tuple[pd.DataFrame, dict]:
    """Depth of the same token in different contexts.

    Returns:
        A table of tokens that occur `least` times or more (token, count, mean, sd, low and high
        quartile of active layers), most varied first; and the shares of the variance of depth that
        lie between tokens and between documents, each corrected for chance. A lookup table could do
        what the token alone decides; the rest is context.
    """
    frame = pd.DataFrame({"id": record.ids.numpy(), "token": np.array(record.tokens, dtype=object),
                          "document": record.document.numpy(),
                          "depth": record.active_layers.double().numpy()})
    frame = frame[free(record)]
    count = frame["id"].map(frame["id"].value_counts())
    often = frame[count >= least]
    table = often.groupby("id").agg(token=("token", "first"), count=("depth", "size"),
                                    mean=("depth", "mean"), sd=("depth", "std"),
                                    low=("depth", lambda d: d.quantile(0.25)),
                                    high=("depth", lambda d: d.quantile(0.75)))
    repeated = frame[count >= 2]
    shares = {"token": explained_variance(repeated["depth"].to_numpy(), repeated["id"].to_numpy()),
              "document": explained_variance(frame["depth"].to_numpy(),
                                             frame["document"].to_numpy())}
    return table.sort_values("sd", ascending=False).reset_index(drop=True), shares
