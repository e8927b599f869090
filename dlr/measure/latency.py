"""Latency of compact execution beside dense, truncated (the ceiling), masked and two-pass runs.

Every routed system runs its router and then follows a recorded plan, so that all skip the same.
"""

import contextlib
import itertools
import math
import random
from dataclasses import dataclass

import pandas as pd
import torch
# this timer waits for an accelerator before it reads the clock
from torch.utils.benchmark import timer
from transformers import DynamicCache

from dlr.measure.shapes import capped, random_model, recorded_gates
from dlr.progress import tqdm
from dlr.routing.attach import attach
from dlr.routing.config import RouterConfig
from dlr.routing.device import device_of, fast_bf16
from dlr.routing.handle import Routing
from dlr.routing.policy import RecordedPlan

SYSTEMS = ("dense", "compiled", "truncation", "masked", "two-pass", "compact")
REFERENCES = ("masked", "two-pass")               # save nothing: timed in every second turn only


@dataclass
class Subject:
    """A model under measurement, and the recorded gates `[n, U]` it follows at each skip ratio."""
    name: str
    model: torch.nn.Module
    routing: Routing
    gates: dict[float, torch.Tensor]
    system: str = "dense"                         # which of SYSTEMS it is set up as

    @property
    def layers(self) -> int:
        return len(self.routing.layers)

    def active(self, skip: float) -> float:
        """Layers a token runs on average."""
        return self.layers - self.routing.units * skip

    def bound(self, skip: float) -> float:
        """Speed-up over dense if time were proportional to the layers run."""
        return self.layers / self.active(skip)

    def plan(self, skip: float, tokens: int | None = None) -> torch.Tensor:
        """Recorded gates `[n, U]`, which begin with `tokens` neighbours whose mean skip is nearest
        `skip`: a few tokens may run deeper or shallower than all do, and truncation cannot.
        """
        gates = self.gates[skip]
        if tokens is None or tokens >= len(gates):
            return gates
        skips = 1 - gates.mean(1).unfold(0, tokens, 1).mean(1)  # by first neighbour
        return gates.roll(-int((skips - skip).abs().argmin()), 0)

    @contextlib.contextmanager
    def as_system(self, system: str, skip: float, tokens: int | None = None):
        """The model set up as one of SYSTEMS at one skip ratio, for work of so many tokens."""
        config = self.model.config
        depth = config.num_hidden_layers
        routed = system not in ("dense", "compiled", "truncation")
        policy = RecordedPlan(self.plan(skip, tokens)) if routed else None
        execution = "compact" if system == "compact" else "masked"
        strategy = "two_pass" if system == "two-pass" else "single_pass"
        self.system = system
        try:
            with self.routing.at(policy=policy, execution=execution,
                                 strategy=strategy), torch.no_grad():
                yield
        finally:
            config.num_hidden_layers = depth


def subject(name: str, logits: torch.Tensor, skips: list[float], *, layers: int | None = None,
            dtype: torch.dtype | None = None, device: str = "cpu", always_keep: int = 4,
            skip_adapter_rank: int = 0, model=None, trained: Routing | None = None,
            attn_implementation: str | None = None) -> Subject:
    """A model of shape `name` (or `model`) with a router, and the recorded plan on its layers.

    Args:
        trained: of a router trained for `model`, whose copy is timed, skip adapters and all; by
            default a fresh one of independent gates is.
        attn_implementation: of random weights, as in `dlr.base.models.attention_of`.
    """
    dtype = dtype or (torch.bfloat16 if fast_bf16() else torch.float32)
    model = capped(model, layers) if model is not None else \
        random_model(name, layers, dtype, device, attn_implementation)
    config = RouterConfig(always_keep=always_keep, skip_adapter_rank=skip_adapter_rank) \
        if trained is None else trained.config
    routing = attach(model, config.changed(keep_first_tokens=0))
    if trained is not None:
        routing.router.load_weights(trained.router.weights())
    return Subject(name, model, routing, {s: recorded_gates(logits, routing.units, s)
                                          for s in {0.0, *skips}})


class Prefill:
    """One pass over `length` tokens with last-token logits; its layers are timed apart."""
    label = "prefill"
    systems = ("dense", "truncation", *REFERENCES, "compact")

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __init__(self, subject: Subject, batch: int, length: int):
        self.subject, self.batch, self.length = subject, batch, length
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, subject.model.config.vocab_size, (batch, length),
                            generator=generator)
        self.ids = ids.to(device_of(subject.model))

    @property
    def tokens_a_run(self) -> int:
        """Tokens of the seconds that `run` gives."""
        return self.tokens

    def run(self) -> dict[str, float]:
        """Seconds by part: 'layers' (embedding to final norm) and 'end to end'."""
        marks = []
        hook = self.subject.routing.decoder.register_forward_hook(lambda *a: marks.append(timer()))
        try:
            start = timer()
            self.subject.model(self.ids, use_cache=False, logits_to_keep=1)
            end = timer()
        finally:
            hook.remove()
        return {"layers": marks[-1] - start, "end to end": end - start}


class Decode:
    """`steps` steps of one token a sequence after a context; seconds a step.

    The output head is timed apart, as its weights are a fifth of a small model's.
    """
    label = "decode"
    # two passes have no cached form
    systems = ("dense", "truncation", "masked", "compact")

    @property
    def tokens(self) -> int:
        return self.batch * self.steps

    def __init__(self, subject: Subject, batch: int, length: int, steps: int = 16):
        self.subject, self.batch, self.length, self.steps = subject, batch, length, steps
        self.prompt = Prefill(subject, batch, length).ids
        self.caches: dict[tuple, DynamicCache] = {}

    @property
    def tokens_a_run(self) -> int:
        """Tokens of the seconds that `run` gives: those of one step."""
        return self.batch

    def _context(self, layers: int) -> DynamicCache:
        """A cache of `length` dense tokens, made once a depth and cropped back afterwards."""
        if layers not in self.caches:
            cache = self._new_cache()
            with self.subject.routing.disabled():
                self.subject.model(self.prompt, past_key_values=cache, logits_to_keep=1)
            self.caches[layers] = cache
        return self.caches[layers]

    def _new_cache(self):
        return DynamicCache(config=self.subject.model.config)

    def _rewind(self, cache) -> None:
        """Forgets the tokens of the steps."""
        cache.crop(-self.steps)

    def _token(self, step: int) -> torch.Tensor:
        return self.prompt[:, step % self.length:][:, :1]

    def run(self) -> dict[str, float]:
        """Seconds a step by part: 'layers' (embedding to final norm) and 'end to end'."""
        model = self.subject.model
        cache = self._context(model.config.num_hidden_layers)
        head, marks = 0.0, []
        hook = self.subject.routing.decoder.register_forward_hook(lambda *a: marks.append(timer()))
        try:
            start = timer()
            for step in range(self.steps):
                model(self._token(step), past_key_values=cache, logits_to_keep=1)
                head += timer() - marks[-1]
            for layer in cache.layers:
                getattr(layer, "keys", None)        # keys still owed are projected, on this clock
            seconds = timer() - start
        finally:
            hook.remove()
        self._rewind(cache)
        return {"layers": (seconds - head) / self.steps, "end to end": seconds / self.steps}


def _variants(subject: Subject, systems, skips) -> list[tuple[str, float, int]]:
    """(system, skip, depth) of every case: truncation has the depths around the active layers."""
    cases = []
    for system, skip in itertools.product(systems, skips):
        if system in ("dense", "compiled"):
            cases.append((system, 0.0, subject.layers))
        elif skip == 0.0 and system != "compact":
            continue                            # only compact execution claims to be free at 0 %
        elif system == "truncation":
            active = subject.active(skip)
            cases += [(system, skip, depth) for depth in {math.floor(active), math.ceil(active)}]
        else:
            cases.append((system, skip, subject.layers))
    return sorted(set(cases), key=lambda case: (SYSTEMS.index(case[0]), *case[1:]))


def measure(work, skips: list[float], systems: list[str] | None = None,
            repeats: int = 5) -> pd.DataFrame:
    """Seconds of every system at every skip ratio.

    Every system runs once a turn, in an order drawn for that turn, so that drift of the machine
    (heat, other users) falls on all alike. The first turn warms up and is not counted.

    Returns:
        One row a system, skip and part, with median (p50), q1, q3 and p95 (seconds),
        tokens_per_second (of the median), peak_gb (1e9 bytes that an accelerator held at once,
        weights included; NaN on a CPU), bound (by layer count), speedup over dense,
        share_of_truncation and share_of_bound. Speed-ups and shares are medians (and quartiles:
        `speedup_q1`, ...) of ratios within a turn, so drift between turns cancels.
    """
    subject = work.subject
    variants = _variants(subject, systems or work.systems, skips)
    times: list[dict] = []
    for turn in tqdm(range(repeats + 1), desc=f"{subject.name}, {work.label}, batch {work.batch}",
                     unit="turn"):
        warm_up = turn == 0
        for system, skip, depth in random.Random(turn).sample(variants, len(variants)):
            if system in REFERENCES and turn % 2 == 0 and not warm_up:
                continue
            with subject.as_system(system, skip, work.tokens), PeakBytes(subject.model) as memory:
                subject.model.config.num_hidden_layers = depth
                seconds = work.run()
            if not warm_up:
                case = {"turn": turn, "system": system, "skip": skip, "depth": depth,
                        "peak_gb": memory.peak / 1e9}
                times += [case | {"part": part, "seconds": spent}
                          for part, spent in seconds.items()]
    times = pd.DataFrame(times)
    peaks = times.groupby(["system", "skip"], as_index=False)["peak_gb"].max()
    return _table(subject, work, _at_active_depth(subject, times)).merge(peaks, how="left")


def _at_active_depth(subject: Subject, times: pd.DataFrame) -> pd.DataFrame:
    """Seconds `[turn, (part, system, skip)]`, truncation interpolated between two depths of a turn.

    4.4 active layers are compared with 0.6 of the time at depth 4 and 0.4 of that at depth 5.
    """
    runs = times.sort_values("depth").groupby(["turn", "part", "system", "skip"])["seconds"]
    # only truncation has two depths; elsewhere both are the same run
    shallower, deeper = runs.first(), runs.last()
    share = shallower.index.get_level_values("skip").map(lambda skip: subject.active(skip) % 1)
    return (shallower + share * (deeper - shallower)).unstack(["part", "system", "skip"])


class PeakBytes:
    """Most bytes that a model's accelerator held inside the block; `peak` is NaN on a CPU."""

    def __init__(self, model):
        self.device = device_of(model)
        self.peak = math.nan

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)


def _table(subject: Subject, work, times: pd.DataFrame) -> pd.DataFrame:
    rows = []
    order = sorted(times, key=lambda key: (SYSTEMS.index(key[1]), key[2]))
    for part, system, skip in order:
        seconds = times[part, system, skip].dropna()
        q1, median, q3, p95 = seconds.quantile([0.25, 0.5, 0.75, 0.95])
        row = {"model": subject.name, "layers": subject.layers,
               "dtype": str(subject.model.dtype).split(".")[-1], "work": work.label, "part": part,
               "batch": work.batch, "length": work.length, "system": system, "skip": skip,
               "median": median, "q1": q1, "q3": q3, "p95": p95, "turns": len(seconds),
               "tokens_per_second": work.tokens_a_run / median,
               "bound": subject.bound(skip)}
        for name, *reference in (("speedup", part, "dense", 0.0),
                                 ("share_of_truncation", part, "truncation", skip)):
            timed = tuple(reference) in times
            ratio = times[tuple(reference)] / seconds if timed else seconds * float("nan")
            row |= {f"{name}{ending}": ratio.quantile(quantile)
                    for ending, quantile in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75))}
        rows.append(row | {"share_of_bound": row["speedup"] / row["bound"]})
    return pd.DataFrame(rows)
