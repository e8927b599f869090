"""How much a per-token plan could save: the greedy oracle, the best static plan, and the router, by KL on one sample.

**The oracle.** Starting from full depth, every round measures, for every token and every layer it still runs, the KL
from the dense model if that layer were skipped too; the least harmful layer is each token's candidate, and the cheapest
candidates of all tokens are taken (one price for all), until the budget is met. It sees the dense model's next-token
distribution, which no router does, but not the next token. Harms are measured with all tokens' candidates at once
(a skipped token still leaves keys and values, so tokens disturb one another little); what is reported is never a sum
of harms, but the KL of the finished plan, run as a whole. Being greedy, it bounds the headroom from below.

**The best static plan** here is the same greedy search with one vector for all tokens, on other (calibration) text.

Notation: b batch, s sequence, U routable units, n tokens that choose: those with a next token, kept first tokens left
out. Skip ratios here are over these n tokens, for all plans alike. All KL and losses are in nats.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from dlr.adapters import without_adapters
from dlr.baselines import greedy_order
from dlr.device import autocast, device_of
from dlr.evaluate import bootstrap
from dlr.likelihood import ROWS, frozen_base, predicted
from dlr.plan import static_gates, static_pair
from dlr.policy import GivenPlan, RouterPolicy
from dlr.progress import tqdm
from dlr.routed import Routing

ROUNDS_PER_UNIT = 2       # rounds in which the plan as a whole loses one unit a token


@dataclass
class Sample:
    """One batch of text, what the dense model says about it, and which of its tokens choose."""
    ids: torch.Tensor             # [b, s]
    real: torch.Tensor            # [b, s] bool
    free: torch.Tensor            # [b, s] bool, the n tokens that choose
    document: torch.Tensor        # [n] index of the text
    teacher: torch.Tensor         # [n, V] probabilities of the dense model
    teacher_entropy: torch.Tensor  # [n] nats
    target: torch.Tensor          # [n] ids of the next tokens
    states: dict[int, torch.Tensor]   # layers run -> [n, d] states, where asked for
    bf16: bool = False

    def __len__(self) -> int:
        return len(self.document)

    def full(self, units: int) -> torch.Tensor:
        """The plan `[b, s, U]` that runs everything."""
        return torch.ones(*self.ids.shape, units, device=self.ids.device)

    def spread(self, plan: torch.Tensor) -> torch.Tensor:
        """Gates `[n, U]` (or one vector `[U]`) of the choosing tokens as a plan `[b, s, U]`; the others run all."""
        gates = self.full(plan.shape[-1])
        gates[self.free] = plan.to(gates)
        return gates


@torch.no_grad()
def open_sample(model, routing: Routing, batch: dict, depths: tuple[int, ...] = (), *, bf16: bool = False) -> Sample:
    """Runs the dense model (adapters off) once on a batch of `data.padded_batches`.

    Args:
        depths: numbers of layers after which the choosing tokens' states are kept; 0 is the embedding.

    Raises:
        ValueError: no token of the batch chooses.
    """
    ids, real = batch["input_ids"].to(device_of(model)), batch["attention_mask"].to(device_of(model)).bool()
    free = torch.zeros_like(real)
    free[:, :-1] = predicted(real)
    free &= real.cumsum(1) - 1 >= routing.config.keep_first_tokens
    if not free.any():
        raise ValueError("No token of this batch chooses its layers: its texts are shorter than keep_first_tokens + 2 "
                         "tokens. Give longer texts.")
    with autocast(ids.device, bf16), frozen_base(model, routing):
        out = model(input_ids=ids, attention_mask=real.long(), use_cache=False, output_hidden_states=bool(depths))
    log_p = out.logits[free].float().log_softmax(-1)
    probabilities = log_p.exp()
    states = {depth: out.hidden_states[depth][free].float().cpu() for depth in depths}
    target = ids.roll(-1, 1)[free]
    return Sample(ids, real, free, batch["row"].to(ids.device).unsqueeze(1).expand_as(ids)[free].cpu(), probabilities,
                  -(probabilities * log_p).sum(-1), target, states, bf16)


class Instrument:
    """Measures plans on one sample; passes that differ in a late unit reuse what the layers before it computed.

    Args:
        adapters: with the checkpoint's LoRA, or on the base model's own weights.
    """

    def __init__(self, model, routing: Routing, sample: Sample, adapters: bool = True):
        self.model, self.routing, self.sample, self.adapters = model, routing, sample, adapters
        self.kept: list = []              # each layer's raw output under the base plan
        self.passes = 0

    @contextlib.contextmanager
    def _setting(self):
        """No gradients, the adapters asked for, and masked execution, whose results are the reference."""
        off = contextlib.nullcontext() if self.adapters else without_adapters(self.model, self.routing)
        before, self.routing.execution = self.routing.execution, "masked"
        try:
            with torch.no_grad(), autocast(self.sample.ids.device, self.sample.bf16), off:
                yield
        finally:
            self.routing.execution = before

    @contextlib.contextmanager
    def _reusing(self, layers: int):
        """The first `layers` decoder layers give back what they computed under the base plan."""
        changed = list(self.routing.layers[:layers])
        before = [vars(layer).get("forward") for layer in changed]          # set where accelerate dispatched the model
        for layer, output in zip(changed, self.kept):
            layer.forward = lambda *args, _output=output, **kwargs: _output
        try:
            yield
        finally:
            for layer, own in zip(changed, before):
                del layer.forward
                if own is not None:
                    layer.forward = own

    def _run(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.sample
        self.passes += 1
        with self.routing.using(GivenPlan(gates)):
            logits = self.model(input_ids=sample.ids, attention_mask=sample.real.long(), use_cache=False).logits
        rows, kl, loss = logits[sample.free], [], []
        for i in range(0, len(rows), ROWS):
            part, p = rows[i:i + ROWS].float(), sample.teacher[i:i + ROWS]
            normaliser = part.logsumexp(-1)
            kl.append(normaliser - (p * part).sum(-1) - sample.teacher_entropy[i:i + ROWS])
            loss.append(normaliser - part.gather(1, sample.target[i:i + ROWS, None]).squeeze(1))
        return torch.cat(kl).cpu(), torch.cat(loss).cpu()

    def base(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and loss `[n]` under a plan `[b, s, U]`, which later calls of `without` start from."""
        self.kept = [None] * len(self.routing.layers)
        handles = [layer.register_forward_hook(
            lambda module, args, output, _i=i: self.kept.__setitem__(_i, output), prepend=True)
            for i, layer in enumerate(self.routing.layers)]
        try:
            with self._setting():
                found = self._run(gates)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def without(self, gates: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and loss `[n]` where the plan given to `base` skips `unit` too, at every choosing token."""
        changed = gates.clone()
        changed[..., unit] = torch.where(self.sample.free, 0.0, changed[..., unit])
        layer, part = divmod(unit, self.routing.units_per_layer)
        whole = self.routing.first + layer + (self.routing.units_per_layer == 1)
        with self._setting(), self._reusing(whole):
            return self._run(changed)


def single_skips(instrument: Instrument, background: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What skipping each unit alone adds to KL and to the loss, `[n, U]` each, on top of a plan (default: all run)."""
    units = instrument.routing.units
    gates = instrument.sample.full(units) if background is None else background
    kl, loss = instrument.base(gates)
    found = [instrument.without(gates, unit) for unit in range(units)]
    return torch.stack([f[0] - kl for f in found], -1), torch.stack([f[1] - loss for f in found], -1)


def static_order(instruments: list[Instrument]) -> list[int]:
    """The greedy order by KL: each time the unit is dropped that leaves least of it. U (U + 3) / 2 passes a sample."""
    units = instruments[0].routing.units

    def harms(dropped, left):
        plans = [instrument.sample.spread(static_gates(units, dropped)) for instrument in instruments]
        for instrument, gates in zip(instruments, plans):
            instrument.base(gates)
        for unit in left:
            yield sum(instrument.without(gates, unit)[0].sum() for instrument, gates in zip(instruments, plans))

    return greedy_order(units, harms)


def greedy_oracle(instruments: list[Instrument], skips: list[float]) -> dict[float, list[torch.Tensor]]:
    """The per-token plans, gates `[n, U]` bool a sample, at each of `skips` (rising; ratios over the choosing tokens).

    About 2 U (U + 1) max(skips) passes a sample, most of which run only the layers after the unit in question.
    """
    units = instruments[0].routing.units
    plans = [torch.ones(len(i.sample), units, dtype=torch.bool) for i in instruments]
    total, done, found = sum(p.numel() for p in plans), 0, {}
    a_round = max(1, total // (units * ROUNDS_PER_UNIT))
    goals = {skip: round(skip * total) for skip in sorted(skips)}
    with tqdm(total=max(goals.values()), desc="per-token oracle", unit="gate") as bar:
        for skip, goal in goals.items():
            while done < goal:
                taken = _cheapest(instruments, plans, min(a_round, goal - done))
                done += taken
                bar.update(taken)
            found[skip] = [p.clone() for p in plans]
    return found


def _cheapest(instruments: list[Instrument], plans: list[torch.Tensor], count: int) -> int:
    """Closes the `count` cheapest of the tokens' candidate units, in place; returns how many it closed."""
    costs, units = [], []
    for instrument, plan in zip(instruments, plans):
        gates = instrument.sample.spread(plan)
        kl, _ = instrument.base(gates)
        harm = torch.stack([instrument.without(gates, u)[0] - kl if plan[:, u].any() else kl
                            for u in range(plan.shape[1])], -1)
        cost, unit = harm.masked_fill(~plan, float("inf")).min(-1)
        costs.append(cost)
        units.append(unit)
    flat = torch.cat(costs)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(stable=True)[:count]] = True
    chosen &= flat.isfinite()
    for plan, unit, mine in zip(plans, units, chosen.split([len(p) for p in plans])):
        plan[mine, unit[mine]] = False
    return int(chosen.sum())


def router_plan(instrument: Instrument, threshold: float) -> torch.Tensor:
    """The router's own gates `[n, U]` at a threshold, on the weights the instrument measures."""
    routing, sample = instrument.routing, instrument.sample
    with instrument._setting(), routing.at(policy=RouterPolicy(), threshold=threshold):
        instrument.model(input_ids=sample.ids, attention_mask=sample.real.long(), use_cache=False)
    return (routing.plan.gates[sample.free] > 0.5).cpu()


def headroom(instruments: list[Instrument], order: list[int], thresholds: dict[float, float],
             ) -> tuple[pd.DataFrame, dict[float, list[torch.Tensor]]]:
    """KL of oracle, best static plan and router at the router's own measured skips.

    Args:
        order: of the static plan, found on other text. thresholds: budget asked for -> the router's threshold.

    Returns:
        One row a budget and document (budget, document, tokens, skip, and summed KL as static, routed, oracle), and
        the oracle's plans by budget. Where the whole greedy plan is worse than the static one, the oracle is the
        static one.
    """
    routed = {budget: [router_plan(i, t) for i in instruments] for budget, t in thresholds.items()}
    skips = {budget: 1 - torch.cat(plans).float().mean().item() for budget, plans in routed.items()}
    oracle = greedy_oracle(instruments, sorted(set(skips.values())))
    parts = []
    for budget, skip in skips.items():
        pair = static_pair(order, len(order), skip)
        for index, i in enumerate(instruments):
            static = pair.mean(*(i.base(i.sample.spread(plan))[0] for plan in pair[:2]))
            parts.append(pd.DataFrame({
                "budget": budget, "skip": skip, "document": i.sample.document.numpy(), "tokens": 1,
                "static": static.double().numpy(),
                "routed": i.base(i.sample.spread(routed[budget][index]))[0].double().numpy(),
                "oracle": i.base(i.sample.spread(oracle[skip][index]))[0].double().numpy()}))
    table = pd.concat(parts).groupby(["budget", "skip", "document"], as_index=False).sum()
    worse = table.groupby("budget")["oracle"].transform("sum") > table.groupby("budget")["static"].transform("sum")
    table.loc[worse, "oracle"] = table.loc[worse, "static"]
    return table, {budget: oracle[skip] for budget, skip in skips.items()}


def captured(table: pd.DataFrame) -> float:
    """(static - routed) / (static - oracle): 0 for the static plan, 1 for the oracle, below 0 if worse than static."""
    sums = table[["static", "routed", "oracle"]].sum()
    room = sums["static"] - sums["oracle"]
    return float((sums["static"] - sums["routed"]) / room) if room > 0 else float("nan")


def headroom_rows(table: pd.DataFrame) -> list[dict]:
    """One row a budget: mean KL a token of each plan, the captured fraction and its 95 % interval over documents."""
    rows = []
    for budget, group in table.groupby("budget"):
        means = {name: float(group[name].sum() / group["tokens"].sum()) for name in ("static", "routed", "oracle")}
        low, high = bootstrap(group[["static", "routed", "oracle"]], captured)
        rows.append({"budget": float(budget), "skip": float(group["skip"].iloc[0]), **means,
                     "captured": captured(group), "captured_low": low, "captured_high": high,
                     "documents": len(group), "tokens": int(group["tokens"].sum())})
    return rows


def sample_summary(samples: list[Sample]) -> dict:
    """How large a sample is."""
    documents = np.unique(np.concatenate([s.document.numpy() for s in samples]))
    return {"documents": len(documents), "tokens": sum(map(len, samples))}
