"""A routed model under observation: it records texts, re-routes them, and measures their cost.

    session = Session("results/token_routing/quick/DLR/checkpoint")
    record = session.read("Any text.")            # two forward passes, dense and routed
    session.at_skip(record, 0.3)                  # another budget from the kept logits; no losses
    session.losses(session.at_skip(record, 0.3))  # the same with its losses, by a routed pass

Every session loads its own copy of the model; `close` takes router and adapters off it again.
"""

import contextlib
import statistics
import time
from dataclasses import replace
from pathlib import Path

import peft  # noqa: F401  takes seconds to import: here, not at the first view
import torch

from dlr.base.data import load_documents, padded_batches
from dlr.explore.layout import Cost
from dlr.explore.opening import open_routed
from dlr.explore.tokens import piece_bytes
from dlr.measure.evaluate import router_logits
from dlr.measure.flops import active_halves, adapter_flops, router_flops, text_flops
from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import last_only
from dlr.measure.record import Record, document_ids, hash_of, record_ids
from dlr.routing.budget import DIAL, calibration_curve, threshold_at
from dlr.routing.decoder import NotRoutable, routing_of
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.policy import GivenPlan, Policy, RecordedPlan, StaticPlan
from dlr.routing.weights import NANO_NAME, causal_lm
from dlr.runs import finished_runs, project_root, results_folder

TURNS = 3                        # runs whose median time is shown
CURVE_DOCUMENTS = 12            # calibration documents that make up for a missing curve


def static_order(routing: Routing) -> list[int] | None:
    """The best static plan's order of units: of a depth router's own book, or else of any finished
    run with this base and units."""
    if hasattr(routing.router, "set_order"):
        return routing.router.order.tolist()
    name = routing.base.get("name") or "nano"
    name = "nano" if name == NANO_NAME else name
    units = {field: getattr(routing.config, field)
             for field in ("always_keep", "keep_last", "unit")}
    for phase in ("pareto", "token_routing"):
        for root in (results_folder(), project_root() / "results"):
            for run in finished_runs(phase, root).values():
                settings = run["run"].get("settings", {})
                alike = all(settings.get(field, value) == value for field, value in units.items())
                if alike and settings.get("model") == name:
                    for row in run["metrics"]["rows"]:
                        if row.get("order"):
                            return row["order"]
    return None


class Session:
    """One routed model and its tokenizer.

    Args:
        checkpoint: as in `dlr.base.find.find_checkpoint`; the embedded router by default.
        base: the base model to open the checkpoint on. Alone, it is opened with the first router
            that was made for it, or, where there is none, with every layer run.
        model, tokenizer: a routed model that is there already, instead of a checkpoint; `close`
            then leaves it alone.
        loading: dtype, device, load_in_4bit and attn_implementation, as in `dlr.load`; what is
            None is as the checkpoint records it, on an accelerator where there is one.

    Raises:
        FileNotFoundError: there is no such checkpoint; the message names those there are.
        ValueError: a model was given without its tokenizer, or with `loading`.
    """

    def __init__(self, checkpoint: str | Path | None = None, base: str | None = None, *,
                 model=None, tokenizer=None, **loading):
        loading = {name: value for name, value in loading.items() if value is not None}
        self.owned = model is None
        self.name, self.folder, self.note = "given model", None, ""
        self.source: tuple = (None, None)
        if self.owned:
            if torch.cuda.is_available():
                loading.setdefault("device", "cuda")
            model, tokenizer, self.folder, self.name, self.note = \
                open_routed(checkpoint, base, **loading)
            self.source = (self.folder, base)        # what opens it again
        elif tokenizer is None or checkpoint is not None or base is not None or loading:
            named = {"checkpoint": checkpoint, "base": base}
            given = [*loading, *(name for name, value in named.items() if value is not None)]
            raise ValueError("Session(model=...) takes a routed model that is loaded, and its "
                             "tokenizer=...; checkpoint, dtype, device and the like have no effect "
                             f"on it (given: {', '.join(given) or 'none'}).")
        self.model, self.tokenizer, self.routing = model, tokenizer, routing_of(model)
        with contextlib.suppress(NotRoutable):       # where it cannot run compact, it stays masked
            self.routing.execution = "compact"
        self._curve: list[float] = list(self.routing.calibration.curve)
        self._dense: dict = {}                       # the base model's pass over the text read last

    @property
    def context(self) -> int:
        """Tokens a text is cut to."""
        config = causal_lm(self.model).config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 1024))

    @property
    def calibrated(self) -> float:
        """The skip ratio the stored threshold was calibrated to, within the dial."""
        known = self.routing.calibration.skip
        if known is None:                            # the ratio that the threshold it has gives
            distance = [abs(at - self.routing.calibration.threshold) for at in self.curve()]
            known = DIAL[distance.index(min(distance))]
        return min(known, DIAL[-1])

    def cut(self, record: Record | None) -> str:
        """Says so where a text was cut; else ''."""
        if record is None or len(record) == record.meta["text_tokens"]:
            return ""
        limit = "the model's context" if len(record) == self.context else \
            "the most that is shown here"
        return f"Cut to {len(record):,} of {record.meta['text_tokens']:,} tokens, {limit}."

    # -- records ----------------------------------------------------------------------------------
    def read(self, text: str, policy: Policy | None = None, threshold: float | None = None,
             longest: int | None = None) -> Record:
        """The record of one text (two passes), cut to the model's context or `longest` tokens."""
        self._dense.clear()                          # the model may have changed meanwhile
        ids = document_ids(self.tokenizer, text, self.model)
        about = {"text": text, "text_tokens": len(ids), "text_hash": hash_of([text])}
        ids = ids[:min(self.context, longest or self.context)]
        return self._record(ids, about, policy, threshold)

    def _record(self, ids: list[int], about: dict, policy: Policy | None,
                threshold: float | None) -> Record:
        """The record of a text; of the one read last, the base model's pass is known already."""
        with self.routing.at(threshold=threshold):
            record = record_ids(self.model, self.routing, self.tokenizer, [ids], policy=policy,
                                text_hash=about["text_hash"], name=self.name, bar=False,
                                dense=self._dense)
        likely = [*ids, *map(int, record.meta["top_tokens"])]
        about = about | {"bytes": piece_bytes(self.tokenizer, likely)}
        return replace(record, meta=record.meta | about)

    def again(self, record: Record, policy: Policy | None = None,
              threshold: float | None = None) -> Record:
        """The text of a record under another plan (one forward pass if it was read last)."""
        about = {name: record.meta[name] for name in ("text", "text_tokens", "text_hash")}
        return self._record(record.ids.tolist(), about, policy, threshold)

    def threshold(self, skip: float) -> float:
        """The threshold for a skip ratio: the calibrated one at its ratio, else by the curve."""
        stored = self.routing.calibration
        if stored.skip is not None and abs(skip - stored.skip) < 0.005:
            return stored.threshold
        return threshold_at(self.curve() if skip > 0 else self._curve or [0.0] * len(DIAL), skip)

    def curve(self) -> list[float]:
        """Thresholds along the dial: those stored with the router, or measured here once."""
        if not self._curve:
            self._curve = self._measured_curve()
        return self._curve

    def _measured_curve(self) -> list[float]:
        documents = load_documents("embedded", "calibration")
        batches = padded_batches(documents, self.tokenizer, min(256, self.context), 4,
                                 limit=CURVE_DOCUMENTS)
        logits, forced = router_logits(self.model, self.routing, batches)
        self.note = (f"{self.note} This router has no stored calibration curve; its thresholds "
                     f"come from {CURVE_DOCUMENTS} documents of the embedded calibration "
                     "split.").strip()
        return calibration_curve(logits, forced)

    def at_skip(self, record: Record, skip: float) -> Record:
        """`record` at another budget by its logits; routed losses and predictions are unknown."""
        return record.at_threshold(self.threshold(skip))

    def losses(self, record: Record) -> Record:
        """`record` with the routed losses and predictions at its own threshold."""
        return self.again(record, threshold=record.meta["threshold"])

    def static(self, record: Record, skip: float | None = None) -> tuple[Record, str]:
        """The text under the best static plan nearest to `skip` (`record`'s), and what plan it is.

        The plan runs on this checkpoint's own weights, which were healed under the router's plans.
        """
        units = self.routing.units
        order = static_order(self.routing)
        what = "best static plan (greedy order, found on this base)"
        if order is None or sorted(order) != list(range(units)):
            order = record.gates.float().mean(0).argsort(stable=True).tolist()
            what = ("static plan of the layers this router keeps least here (no finished run tells "
                    "the best static order)")
        skip = record.skip_ratio if skip is None else skip
        free = (record.position >= record.meta["keep_first_tokens"]).float().mean().item() or 1.0
        gates = torch.ones(units)
        gates[order[:min(units, round(skip * units / free))]] = 0.0
        return self.again(record, policy=StaticPlan(gates)), what

    # -- cost -------------------------------------------------------------------------------------
    def flops(self, record: Record) -> Cost:
        """FLOPs of a text under its plan and dense; no times."""
        config, router, meta = causal_lm(self.model).config, self.routing.router, record.meta
        dense = torch.full((len(record),), meta["layers"], dtype=torch.double)
        always = meta["always_keep"] + meta["keep_last"]
        active = active_halves(record.gates, always, meta["units_per_layer"])
        asked = router_flops(router) if meta["policy"] == "RouterPolicy" else 0
        past = int((~record.gates).sum()) * adapter_flops(router)
        return Cost(text_flops(config, dense, record.position),
                    text_flops(config, active, record.position, asked) + past,
                    execution=self.routing.execution)

    def timed(self, record: Record, repeats: int = TURNS) -> Cost:
        """`flops` with the milliseconds of one forward pass, medians of `repeats` turns."""
        return self.cost(record, [self.turn(record) for _ in range(repeats)])

    def cost(self, record: Record, turns: list[dict[str, float]]) -> Cost:
        """`flops` with the medians of what `turn` measured."""
        medians = {f"ms_{name}": 1000 * statistics.median(turn[name] for turn in turns)
                   for name in turns[0]}
        return replace(self.flops(record), **medians)

    @torch.no_grad()
    def turn(self, record: Record) -> dict[str, float]:
        """Seconds of one forward pass, the logits of the last token only, as a prompt is read.

        'dense' is the base model; 'routed' the record's plan and the router that made it on the
        base's weights, which is what merging LoRA leaves; 'unmerged' has LoRA's products apart.
        """
        ids = record.ids[None].to(device_of(self.model))
        plan = RecordedPlan(record.gates) if record.meta["policy"] == "RouterPolicy" else \
            GivenPlan(record.gates[None])
        with frozen_base(self.model, self.routing):
            dense = self._seconds(ids)
            with self.routing.using(plan):
                routed = self._seconds(ids)
        with self.routing.using(plan):
            return {"dense": dense, "routed": routed, "unmerged": self._seconds(ids)}

    def _seconds(self, ids: torch.Tensor) -> float:
        started = time.perf_counter()
        self.model(input_ids=ids, use_cache=False, **last_only(self.model))
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def close(self):
        """Takes router, hooks and adapters off; returns the base model, bit for bit what it was.

        A model that was given from outside is left as it is.
        """
        if not self.owned or self.model is None:
            return self.model
        self._dense.clear()
        self.routing.detach()
        base = self.model.unload() if hasattr(self.model, "unload") else self.model
        self.model = None
        return base
