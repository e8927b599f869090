"""Perplexity with intervals over documents, and measured skip, for any policy.

Notation: b batch, s sequence, U routable units. All tables hold one row a document.
"""

import math

import numpy as np
import pandas as pd
import torch

from dlr.base.data import Documents, padded_batches
from dlr.measure.likelihood import cross_entropy, frozen_base, kl_to_teacher, predicted
from dlr.measure.logits import chunks, last_only, logits_of
from dlr.progress import tqdm
from dlr.routing.budget import calibration_curve, threshold_for
from dlr.routing.config import Calibration
from dlr.routing.decoder import routing_of
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.policy import Policy, RouterPolicy, refuse_without_plan

BOOTSTRAP = 1000


def likelihoods(model, routing: Routing, ids: torch.Tensor, real: torch.Tensor, logits,
                teacher) -> dict:
    """Columns nll and (with a teacher) kl, `[b]` each: sums over a row's predicted tokens, in nats.

    `logits` and `teacher` are what `logits_of` gave for the routed and for the frozen model. Where
    `real` `[b, s]` leaves out places at a row's start, these give context and are not counted.
    """
    mask = predicted(real)
    sums = {"nll": torch.zeros(mask.shape, dtype=torch.float64)}
    if teacher is not None:
        sums["kl"] = torch.zeros_like(sums["nll"])
    for places in chunks(model, mask.shape[1], len(ids)):
        window = slice(places.start, places.stop + 1)       # with the token after the last place
        scored = mask[:, places].cpu()
        if not scored.any():
            continue
        with routing.autocast():
            student = logits(window)
        sums["nll"][:, places][scored] = cross_entropy(student, ids[:, window],
                                                       real[:, window]).double().cpu()
        if teacher is not None:
            with routing.autocast(), frozen_base(model, routing):
                dense = teacher(window)
            sums["kl"][:, places][scored] = kl_to_teacher(student, dense,
                                                          real[:, window]).double().cpu()
    return {name: values.sum(1).numpy() for name, values in sums.items()}


@torch.no_grad()
def evaluate(model, routing: Routing, batches: list[dict], policy: Policy | None, *,
             kl: bool = False, describe: str = "evaluating", bar: bool = True) -> pd.DataFrame:
    """One row a document: predicted and real tokens, summed nll (nats), and keep counts a unit.

    Padding counts in none of these: columns `padding` and `padding_kept` hold its positions, and
    the gates that are open there, for who has to tell of both.

    `policy=None` evaluates the model at full depth. With `kl`, column `kl` sums KL(base || this
    model). Memory does not grow with text times vocabulary: see `dlr.measure.logits`.
    """
    rows = []
    device = device_of(model)
    model.eval()
    for batch in tqdm(batches, desc=describe, unit="batch", disable=not bar):
        ids, real = batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()
        with routing.autocast(), routing.using(policy):
            logits = logits_of(model, routing, ids, real.long())
            gates = torch.ones(*ids.shape, routing.units)
            if policy is not None:
                gates = routing.plan.gates.float().cpu()
        teacher = None
        if kl:
            with routing.autocast(), frozen_base(model, routing):
                teacher = logits_of(model, routing, ids, real.long())
        padding = ~real.cpu()
        counts = ((gates > 0.5) & ~padding.unsqueeze(-1)).sum(1).numpy()
        kept = ((gates > 0.5) & padding.unsqueeze(-1)).sum((1, 2)).numpy()
        rows.append(pd.DataFrame(
            {"doc": batch["row"].numpy(), "predicted": predicted(real).sum(1).cpu().numpy(),
             "tokens": real.sum(1).cpu().numpy(),
             "padding": padding.sum(1).numpy(), "padding_kept": kept,
             **likelihoods(model, routing, ids, real, logits, teacher),
             **{f"keep_{unit}": counts[:, unit] for unit in range(counts.shape[1])}}))
    return pd.concat(rows).sort_values("doc").reset_index(drop=True)


def skip_ratio(table: pd.DataFrame) -> float:
    """1 - mean gate over real tokens and routable units."""
    keep = table.filter(like="keep_")
    return float(1 - keep.to_numpy().sum() / (table["tokens"].sum() * keep.shape[1]))


def bootstrap(table: pd.DataFrame, statistic, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over documents drawn anew; NaN draws are left out.

    Args:
        table: one row a document.
        statistic: of the columns' sums: it gets them as a table of one row a draw, and returns a
            value a draw.
    """
    generator = np.random.default_rng(seed)
    count = len(table)
    times = np.stack([np.bincount(generator.integers(0, count, count), minlength=count)
                      for _ in range(BOOTSTRAP)])                  # that a draw holds a document
    sums = pd.DataFrame(times @ table.to_numpy(dtype=np.float64), columns=table.columns)
    draws = np.asarray(statistic(sums), dtype=np.float64)
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _nll(sums):
    return sums["nll"] / sums["predicted"]


def mean_nll(table: pd.DataFrame) -> float:
    """Mean negative log-likelihood a predicted token, in nats."""
    return float(_nll(table[["nll", "predicted"]].sum()))


def perplexity(table: pd.DataFrame) -> float:
    """exp of the mean negative log-likelihood a predicted token."""
    return float(np.exp(mean_nll(table)))


def summary(table: pd.DataFrame, always_run: int, units_per_layer: int = 1) -> dict:
    """Perplexity with its interval over documents, measured skip and mean active layers."""
    sums = table[["nll", "predicted"]]
    low, high = bootstrap(sums, lambda sums: np.exp(_nll(sums)))
    keep = table.filter(like="keep_").sum() / table["tokens"].sum()
    row = {"perplexity": perplexity(table), "perplexity_low": low, "perplexity_high": high,
           "skip": skip_ratio(table), "documents": len(table),
           "active_layers": always_run + float(keep.sum()) / units_per_layer,
           "predicted_tokens": int(table["predicted"].sum()),
           "keep_rate": [round(float(k), 4) for k in keep]}
    if "kl" in table:
        row["kl"] = float(table["kl"].sum() / table["predicted"].sum())
    return row


def paired_difference(first: pd.DataFrame, second: pd.DataFrame) -> dict:
    """Mean nll a token of `first` minus `second` on the same documents, with a paired interval.

    Negative: `first` predicts the text better.

    Raises:
        ValueError: the tables are not of the same documents.
    """
    if len(first) != len(second) or not np.allclose(first[["doc", "predicted"]],
                                                    second[["doc", "predicted"]]):
        raise ValueError("A paired difference needs two tables of the same documents, cut alike; "
                         f"these are of {len(first)} and {len(second)} documents.")
    differences = pd.DataFrame({"nll": first["nll"] - second["nll"],
                                "predicted": first["predicted"]})
    low, high = bootstrap(differences, _nll)
    return {"nll_difference": mean_nll(differences), "low": low, "high": high}


@torch.no_grad()
def router_logits(model, routing: Routing, batches: list[dict]) -> tuple[torch.Tensor, int]:
    """Logits `[n, U]` of real tokens that the router decides for, and how many gates are forced.

    Raises:
        ValueError: the router decides layer by layer, so its logits depend on earlier gates.
    """
    refuse_without_plan(routing, "A calibration curve")
    logits = []
    forced = 0
    device = device_of(model)
    for batch in tqdm(batches, desc="calibrating", unit="batch"):
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        # The logits depend on the first K layers alone: later ones are skipped, and of the model's
        # own logits, which nobody reads, only the last are made.
        with routing.autocast(), routing.at(policy=RouterPolicy(), threshold=math.inf):
            model(input_ids=ids, attention_mask=mask, use_cache=False, **last_only(model))
        plan = routing.plan
        free = plan.real & (mask.cumsum(1) - 1 >= routing.config.forced_tokens)
        logits.append(plan.logits[free].float().cpu())
        forced += int((plan.real & ~free).sum()) * routing.units
    return torch.cat(logits), forced


def calibrate_router(model, routing: Routing, batches: list[dict], target_skip: float) -> float:
    """Sets the threshold that gives `target_skip` on `batches`, and the dial; returns the ratio.

    The logits depend on the first K layers only, which every plan runs: one pass is exact. A router
    that decides layer by layer gets its threshold by bisection, and no dial.
    """
    if not routing.router.ahead:
        routing.calibration = _bisected(model, routing, batches, target_skip)
        return routing.calibration.skip
    logits, forced = router_logits(model, routing, batches)
    threshold = threshold_for(logits, target_skip, forced)
    skip = (logits <= threshold).sum().item() / (logits.numel() + forced)
    routing.calibration = Calibration(threshold, skip, calibration_curve(logits, forced))
    return skip


def _bisected(model, routing: Routing, batches: list[dict], target_skip: float) -> Calibration:
    """The threshold, to a thousandth of a logit, whose measured skip came nearest to the target."""
    low, high = -30.0, 30.0
    tried = []
    while high - low > 1e-3:
        middle = (low + high) / 2
        with routing.at(threshold=middle):
            skip = skip_ratio(evaluate(model, routing, batches, RouterPolicy(), bar=False))
        tried.append(Calibration(middle, skip))
        low, high = (middle, high) if skip < target_skip else (low, middle)
    return min(tried, key=lambda calibration: abs(calibration.skip - target_skip))


def calibrate(model, tokenizer, texts: list[str], skip: float, max_len: int = 256) -> float:
    """Sets the router's threshold so that it skips a share `skip` of routable layers on `texts`.

    Texts are cut to `max_len` tokens. `dlr.budget` can dial afterwards. Returns the measured skip.

    Raises:
        NotRoutable: no router is attached.
        ValueError: no list of texts, or a skip ratio that cannot be reached.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("calibrate needs a list of texts, a string each; given was "
                         f"{'one string' if isinstance(texts, str) else 'none'}.")
    batches = padded_batches(Documents("given", "calibration", texts, ""), tokenizer, max_len, 8)
    return calibrate_router(model, routing_of(model), batches, skip)
