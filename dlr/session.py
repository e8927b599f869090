"""A routed model under observation: it reads texts into records, re-routes them at any budget, and measures their cost.

    session = Session("results/token_routing/quick/DLR/checkpoint")
    record = session.read("Any text.")            # two forward passes, dense and routed
    session.at_skip(record, 0.3)                  # another budget from the kept logits, at once; no losses
    session.losses(session.at_skip(record, 0.3))  # the same with its losses

Every session loads its own copy of the model; `close` takes router and adapters off it again.
"""

import contextlib
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import peft                     # noqa: F401  takes seconds to import; paid here so that the first view need not
import torch
from transformers.utils import logging as bars

from dlr.calibration import DIAL, calibration_curve, threshold_at
from dlr.data import load_documents, padded_batches
from dlr.discovery import label_of
from dlr.encoding import encode
from dlr.device import device_of
from dlr.evaluate import router_logits
from dlr.flops import active_halves, adapter_flops, router_flops, text_flops
from dlr.logits import last_only
from dlr.likelihood import frozen_base
from dlr.opened import load
from dlr.policy import GivenPlan, Policy, RecordedPlan, StaticPlan
from dlr.record import Record, record
from dlr.routed import NANO_NAME, NotRoutable, Routing, causal_lm, routing_of
from dlr.runs import finished_runs, project_root, results_folder
from dlr.tokens import piece_bytes
from dlr.layout import Cost

TURNS = 3                        # runs whose median time is shown
CURVE_DOCUMENTS = 12            # calibration documents that make up for a missing curve


def static_order(routing: Routing) -> list[int] | None:
    """Units in the order in which the best static plan drops them, from any finished run with this base and these units."""
    config = routing.config
    name, units = routing.base.get("name") or "nano", ("always_keep", "keep_last", "unit")
    for phase in ("pareto", "token_routing"):
        for root in (results_folder(), project_root() / "results"):
            for run in finished_runs(phase, root).values():
                settings = run["run"].get("settings", {})
                if settings.get("model") not in ({"nano"} if name == NANO_NAME else {name}) or any(
                        settings.get(unit, getattr(config, unit)) != getattr(config, unit) for unit in units):
                    continue
                for row in run["metrics"]["rows"]:
                    if row.get("order"):
                        return row["order"]
    return None


class Session:
    """One routed model and its tokenizer.

    Args:
        checkpoint: as in `dlr.discovery.find_checkpoint`; the embedded router by default.
        model, tokenizer: a routed model that is there already, instead of a checkpoint; `close` then leaves it alone.
        loading: dtype, device and load_in_4bit, as in `dlr.from_pretrained`; what is None is as the checkpoint records
            it, on an accelerator where there is one.

    Raises:
        FileNotFoundError: there is no such checkpoint; the message names those there are.
        ValueError: a model was given without its tokenizer, or with `loading`, which can no longer act.
    """

    def __init__(self, checkpoint: str | Path | None = None, *, model=None, tokenizer=None, **loading):
        loading = {name: value for name, value in loading.items() if value is not None}
        self.owned, self.note = model is None, ""
        self.name, self.folder = "given model", None
        if self.owned:
            if torch.cuda.is_available():
                loading.setdefault("device", "cuda")
            with _no_bars(), _warnings_of_this_project() as said:
                opened = load(checkpoint, variant="routed", say=lambda words: None, **loading)
            self.folder, self.name = opened.folder, label_of(opened.folder)
            self.note = " ".join(said).replace(str(self.folder), self.name)
            model, tokenizer, _ = opened
        elif tokenizer is None or checkpoint is not None or loading:
            given = [*loading, *(["checkpoint"] if checkpoint is not None else [])]
            raise ValueError("Session(model=...) takes a routed model that is loaded, and its tokenizer=...; "
                             f"checkpoint, dtype, device and the like have no effect on it (given: {', '.join(given) or 'none'}).")
        self.model, self.tokenizer, self.routing = model, tokenizer, routing_of(model)
        with contextlib.suppress(NotRoutable):              # where it cannot run compact, it stays masked
            self.routing.execution = "compact"
        self._curve: list[float] = list(self.routing.calibration.curve)

    @property
    def context(self) -> int:
        """Tokens a text is cut to."""
        return int(getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", 1024))

    @property
    def calibrated(self) -> float:
        """The skip ratio the stored threshold was calibrated to, within the dial."""
        known = self.routing.calibration.skip
        if known is None:                                   # the ratio that the threshold it was left with gives
            distance = [abs(at - self.routing.calibration.threshold) for at in self.curve()]
            known = DIAL[distance.index(min(distance))]
        return min(known, DIAL[-1])

    def length(self, text: str) -> int:
        """Tokens of `text`, the opening one included."""
        return 1 + len(encode(self.tokenizer, text))

    def cut(self, found: Record | None) -> str:
        """Says so where a text was cut; else ''."""
        if found is None or len(found) < found.meta.get("longest", self.context):
            return ""                                       # whole: no need to count its tokens at every redraw
        tokens = self.length(found.meta["text"])
        limit = "the model's context" if len(found) == self.context else "the most that is shown here"
        return f"Cut to {len(found):,} of {tokens:,} tokens, {limit}." if tokens > len(found) else ""

    # -- records ----------------------------------------------------------------------------------------------------
    def read(self, text: str, policy: Policy | None = None, threshold: float | None = None,
             longest: int | None = None) -> Record:
        """The record of one text (two forward passes), cut to the model's context, or to `longest` tokens if fewer."""
        longest = min(self.context, longest or self.context)
        with self.routing.at(threshold=threshold):
            found = record(self.model, self.routing, self.tokenizer, [text], max_len=longest, policy=policy,
                           name=self.name, bar=False)
        likely = [*found.ids.tolist(), *map(int, found.meta["top_tokens"])]
        return replace(found, meta=found.meta | {"text": text, "longest": longest,
                                                "bytes": piece_bytes(self.tokenizer, likely)})

    def threshold(self, skip: float) -> float:
        """The threshold for a skip ratio: the stored one at the calibrated ratio, else along the calibration curve."""
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
        batches = padded_batches(documents, self.tokenizer, min(256, self.context), 4, limit=CURVE_DOCUMENTS)
        logits, forced = router_logits(self.model, self.routing, batches)
        self.note = (f"{self.note} This router has no stored calibration curve; its thresholds come from "
                     f"{CURVE_DOCUMENTS} documents of "
                     "the embedded calibration split.").strip()
        return calibration_curve(logits, forced)

    def at_skip(self, found: Record, skip: float) -> Record:
        """`found` re-routed at another budget, from its logits alone; routed losses and predictions are unknown."""
        return found.at_threshold(self.threshold(skip))

    def losses(self, found: Record) -> Record:
        """`found` with the routed losses and predictions at its own threshold (two forward passes)."""
        return self.read(found.meta["text"], threshold=found.meta["threshold"], longest=found.meta.get("longest"))

    def static(self, found: Record, skip: float | None = None) -> tuple[Record, str]:
        """The same text under the best static plan whose skip ratio is nearest to `skip` (that of `found`), and what it is.

        The plan runs on this checkpoint's own weights, which were healed under the router's plans.
        """
        units, order = self.routing.units, static_order(self.routing)
        what = "best static plan (greedy order of a finished run on this base)"
        if order is None or sorted(order) != list(range(units)):
            order = found.gates.float().mean(0).argsort(stable=True).tolist()
            what = "static plan of the layers this router keeps least here (no finished run tells the best static order)"
        free = (found.position >= found.meta["keep_first_tokens"]).float().mean().item() or 1.0
        gates = torch.ones(units)
        gates[order[:min(units, round((found.skip_ratio if skip is None else skip) * units / free))]] = 0.0
        return self.read(found.meta["text"], policy=StaticPlan(gates), longest=found.meta.get("longest")), what

    # -- cost -------------------------------------------------------------------------------------------------------
    def flops(self, found: Record) -> Cost:
        """FLOPs of a text under its plan and dense; no times."""
        config = causal_lm(self.model).config
        meta = found.meta
        dense = torch.full((len(found),), meta["layers"], dtype=torch.double)
        active = active_halves(found.gates, meta["always_keep"] + meta["keep_last"], meta["units_per_layer"])
        router = router_flops(self.routing.router) if meta["policy"] == "RouterPolicy" else 0
        past = int((~found.gates.bool()).sum()) * adapter_flops(self.routing.router.width,
                                                                self.routing.config.skip_adapter_rank)
        return Cost(text_flops(config, dense, found.position), text_flops(config, active, found.position, router) + past,
                    execution=self.routing.execution)

    def timed(self, found: Record, repeats: int = TURNS) -> Cost:
        """`flops` with the milliseconds of one forward pass, medians of `repeats` turns."""
        return self.cost(found, [self.turn(found) for _ in range(repeats)])

    def cost(self, found: Record, turns: list[dict[str, float]]) -> Cost:
        """`flops` with the medians of what `turn` measured."""
        return replace(self.flops(found), **{f"ms_{name}": 1000 * statistics.median(turn[name] for turn in turns)
                                             for name in turns[0]})

    @torch.no_grad()
    def turn(self, found: Record) -> dict[str, float]:
        """Seconds of one forward pass: 'dense', the base model; 'routed', the plan of `found` and the router that made it on
        the base's weights, which is what merging LoRA leaves; 'unmerged', the same with LoRA's products apart. As in
        reading a prompt, logits are made of the last token only."""
        ids = found.ids[None].to(device_of(self.model))
        plan = RecordedPlan(found.gates) if found.meta["policy"] == "RouterPolicy" else GivenPlan(found.gates[None])
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
        self.routing.detach()
        base = self.model.unload() if hasattr(self.model, "unload") else self.model
        self.model = None
        return base


@contextlib.contextmanager
def _no_bars():
    """Without transformers' bar, which would stay on the page of a model that loads in a second."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _warnings_of_this_project():
    """Yields a list that then holds what this project warned of, for the view; other warnings go on their way."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield said
    for warning in caught:
        if Path(warning.filename).parent == Path(__file__).parent:
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
