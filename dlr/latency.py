"""Latency of a plan: dense, static truncation (the ceiling), masked, two-pass and compact, measured in turns.

Every routed system runs its router, and then follows a recorded plan, so that all systems skip the same.
"""

import contextlib
import itertools
import math
import random
import statistics
import weakref
from dataclasses import dataclass

import pandas as pd
import torch
from torch.utils.benchmark import timer              # waits for an accelerator before it reads the clock
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from dlr.device import fast_bf16
from dlr.router_config import RouterConfig
from dlr.flops import flops_per_token, router_flops
from dlr.policy import RecordedPlan
from dlr.progress import tqdm
from dlr.routed import Routing, attach
from dlr.shapes import random_model, recorded_gates

SYSTEMS = ("dense", "truncation", "masked", "two-pass", "compact")
REFERENCES = ("masked", "two-pass")               # save nothing: timed in every second turn only


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes of tensors made inside the block and alive at once."""

    def __enter__(self):
        self.now = self.peak = 0
        self.known: set[int] = set()
        return super().__enter__()

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out


@dataclass
class Subject:
    """A model under measurement. `gates` `[n, U]` by skip ratio; `bound`-s follow from the layer counts."""
    name: str
    model: torch.nn.Module
    routing: Routing
    gates: dict[float, torch.Tensor]

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
        """Recorded gates `[n, U]`, beginning with `tokens` neighbours whose mean skip is as near `skip` as any such have.

        A few tokens may well run deeper or shallower than all do on average; truncation does not.
        """
        gates = self.gates[skip]
        if tokens is None or tokens >= len(gates):
            return gates
        means = 1 - gates.mean(1).unfold(0, tokens, 1).mean(1)
        return gates.roll(-int((means - skip).abs().argmin()), 0)

    @contextlib.contextmanager
    def as_system(self, system: str, skip: float, tokens: int | None = None):
        """The model set up as one of SYSTEMS at one skip ratio, for a piece of work of so many tokens."""
        routing, config = self.routing, self.model.config
        before = routing.execution, routing.config.strategy, config.num_hidden_layers
        policy = None if system in ("dense", "truncation") else RecordedPlan(self.plan(skip, tokens))
        routing.execution = "compact" if system == "compact" else "masked"
        routing.config.strategy = "two_pass" if system == "two-pass" else "single_pass"
        try:
            with routing.using(policy), torch.no_grad():
                yield
        finally:
            routing.execution, routing.config.strategy, config.num_hidden_layers = before


def subject(name: str, logits: torch.Tensor, skips: list[float], *, layers: int | None = None,
            dtype: torch.dtype | None = None, device: str = "cpu", always_keep: int = 4, model=None) -> Subject:
    """A model of shape `name` (or `model`) with a router, and the recorded plan stretched over its layers."""
    dtype = dtype or (torch.bfloat16 if fast_bf16() else torch.float32)
    model = model if model is not None else random_model(name, layers, dtype, device)
    routing = attach(model, RouterConfig(always_keep=always_keep, keep_first_tokens=0))
    return Subject(name, model, routing, {s: recorded_gates(logits, routing.units, s) for s in {0.0, *skips}})


class Prefill:
    """One forward pass over `length` tokens with last-token logits. Times the layers apart from the whole."""
    label = "prefill"
    systems = SYSTEMS

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __init__(self, subject: Subject, batch: int, length: int):
        self.subject, self.batch, self.length = subject, batch, length
        generator = torch.Generator().manual_seed(1)
        device = next(subject.model.parameters()).device
        self.ids = torch.randint(2, subject.model.config.vocab_size, (batch, length), generator=generator).to(device)

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
    """`steps` greedy-shaped steps of one token a sequence after a context; seconds a step."""
    label = "decode"
    systems = ("dense", "truncation", "masked", "compact")            # two passes have no cached form

    @property
    def tokens(self) -> int:
        return self.batch * self.steps

    def __init__(self, subject: Subject, batch: int, length: int, steps: int = 16):
        self.subject, self.batch, self.length, self.steps = subject, batch, length, steps
        self.prompt = Prefill(subject, batch, length).ids
        self.caches: dict[tuple, DynamicCache] = {}

    def _context(self, layers: int) -> DynamicCache:
        """A cache of `length` dense tokens, made once a depth and cropped back afterwards."""
        if layers not in self.caches:
            cache = DynamicCache(config=self.subject.model.config)
            with self.subject.routing.disabled():
                self.subject.model(self.prompt, past_key_values=cache, logits_to_keep=1)
            self.caches[layers] = cache
        return self.caches[layers]

    def run(self) -> dict[str, float]:
        """Seconds a step, 'end to end'."""
        model = self.subject.model
        cache = self._context(model.config.num_hidden_layers)
        start = timer()
        for step in range(self.steps):
            model(self.prompt[:, step:step + 1], past_key_values=cache, logits_to_keep=1)
        end = timer()
        cache.crop(-self.steps)
        return {"end to end": (end - start) / self.steps}


def _variants(subject: Subject, systems, skips) -> list[tuple[str, float, int]]:
    """(system, skip, depth): truncation runs at the two whole depths around the plan's active layers."""
    chosen = []
    for system, skip in itertools.product(systems, skips):
        if system == "dense":
            chosen.append((system, 0.0, subject.layers))
        elif skip == 0.0 and system != "compact":
            continue                                             # only compact execution claims to be free at 0 %
        elif system == "truncation":
            active = subject.active(skip)
            chosen += [(system, skip, depth) for depth in {math.floor(active), math.ceil(active)}]
        else:
            chosen.append((system, skip, subject.layers))
    return sorted(set(chosen), key=lambda v: (SYSTEMS.index(v[0]), v[1], v[2]))


def measure(work, skips: list[float], systems: list[str] | None = None, repeats: int = 5) -> pd.DataFrame:
    """Seconds of every system at every skip ratio, in turns, each in an order of its own: one row a system, skip and part.

    Truncation lies between two whole depths where the plan's active layers are no whole number; its time is interpolated.

    Columns: median, q1, q3 (seconds), bound (layer count), speedup over dense, share_of_truncation, share_of_bound. Speed-ups
    and shares are medians (and quartiles: `speedup_q1`, ...) of ratios within a turn, which drift between turns leaves alone.
    """
    subject = work.subject
    variants = _variants(subject, systems or work.systems, skips)
    times: list[dict] = []
    for repeat in tqdm(range(repeats + 1), desc=f"{subject.name}, {work.label}, batch {work.batch}", unit="turn"):
        for system, skip, depth in random.Random(repeat).sample(variants, len(variants)):
            warm_up = repeat == 0
            if system in REFERENCES and not warm_up and repeat % 2 == 0:
                continue
            with subject.as_system(system, skip, work.tokens):
                subject.model.config.num_hidden_layers = depth
                for part, seconds in work.run().items():
                    if not warm_up:
                        times.append({"turn": repeat, "part": part, "system": system, "skip": skip, "depth": depth,
                                      "seconds": seconds})
    return _table(subject, work, _at_active_depth(subject, pd.DataFrame(times)))


def _at_active_depth(subject: Subject, times: pd.DataFrame) -> pd.DataFrame:
    """Seconds `[turn, (part, system, skip)]`; those of truncation interpolated between the two depths of the same turn."""
    # 4.4 active layers lie between depths 4 and 5: their times count 0.6 and 0.4, and the sum below adds them up
    weight = 1 - (times["depth"] - times["skip"].map(subject.active)).abs()
    times = times.assign(seconds=times["seconds"] * weight.where(times["system"] == "truncation", 1.0))
    found = times.groupby(["turn", "part", "system", "skip"])["seconds"].sum()
    return found.unstack(["part", "system", "skip"])


def _table(subject: Subject, work, times: pd.DataFrame) -> pd.DataFrame:
    rows = []
    order = sorted(times, key=lambda key: (SYSTEMS.index(key[1]), key[2]))
    for part, system, skip in order:
        seconds = times[part, system, skip].dropna()
        q1, median, q3 = seconds.quantile([0.25, 0.5, 0.75])
        row = {"model": subject.name, "layers": subject.layers, "dtype": str(subject.model.dtype).split(".")[-1],
               "work": work.label, "part": part, "batch": work.batch, "length": work.length, "system": system,
               "skip": skip, "median": median, "q1": q1, "q3": q3, "turns": len(seconds), "bound": subject.bound(skip)}
        for name, other in (("speedup", ("dense", 0.0)), ("share_of_truncation", ("truncation", skip))):
            ratio = times[part, *other] / seconds if (part, *other) in times else seconds * float("nan")
            row |= {f"{name}{end}": ratio.quantile(share) for end, share in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75))}
        rows.append(row | {"share_of_bound": row["speedup"] / row["bound"]})
    return pd.DataFrame(rows)


def row_costs(work: Prefill, skips: list[float], repeats: int = 9) -> pd.DataFrame:
    """What the matrix library leaves of the layer-count bound: it works slower on few rows than on many.

    Times the layer's largest product alone, at the rows each layer of the plan keeps, in turns.

    Columns: skip; bound; product_bound, the speed-up over dense if every layer's time went as its largest product's does;
    row_cost, the mean time of a kept row there relative to one of a full pass.
    """
    subject = work.subject
    layer = subject.routing.layers[subject.routing.first]
    largest = max((m for m in layer.modules() if isinstance(m, torch.nn.Linear)), key=lambda m: m.weight.numel())
    total = work.batch * work.length
    plans = {skip: subject.plan(skip, total) for skip in skips}
    kept = {skip: [int(n) for n in plan[torch.arange(total) % len(plan)].sum(0)] for skip, plan in plans.items()}
    x = torch.randn(total, largest.in_features, dtype=largest.weight.dtype, device=largest.weight.device)
    times: dict[int, list[float]] = {n: [] for n in sorted({total, *itertools.chain(*kept.values())} - {0})}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for n, found in times.items():
                start = timer()
                largest(x[:n])
                found.append(timer() - start)
    cost = {0: 0.0} | {n: statistics.median(found[1:]) for n, found in times.items()}
    rows = []
    for skip in skips:
        run = sum(cost[n] for n in kept[skip]) / cost[total]
        always = subject.layers - subject.routing.units
        rows.append({"skip": skip, "bound": subject.bound(skip), "product_bound": subject.layers / (always + run),
                     "row_cost": run / (sum(kept[skip]) / total)})
    return pd.DataFrame(rows)


def where(work: Prefill, skips: list[float], repeats: int = 3) -> pd.DataFrame:
    """Where a prefill's time goes, by torch.profiler: milliseconds of products, attention and all other operations.

    Each beside what a time proportional to the layers run would be (`<kind>_at_bound`), from the dense model's profile.
    Compare within the table: profiling itself takes time, most of it between operations, which is not counted here.
    """
    subject = work.subject
    device = next(subject.model.parameters()).device.type
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])]
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    cases = [("dense", 0.0), *(("compact", skip) for skip in skips)]
    found: dict[tuple, list[dict]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            with subject.as_system(*case, work.tokens), torch.profiler.profile(activities=activities) as profiled:
                work.run()
            spent = dict.fromkeys(("products", "attention", "other"), 0.0)
            for event in profiled.key_averages():
                if event.device_type == torch.autograd.DeviceType.CPU:         # operations, not the kernels they launch
                    spent[_kind(event.key)] += getattr(event, clock) / 1e3
            found[case].append(spent)
    rows = []
    for (system, skip), turns in found.items():
        median = {kind: statistics.median(turn[kind] for turn in turns) for kind in turns[0]}
        rows.append({"system": system, "skip": skip} | median)
        rows[-1] |= {f"{kind}_at_bound": rows[0][kind] / subject.bound(skip) for kind in median}
    return pd.DataFrame(rows)


def _kind(operation: str) -> str:
    if "attention" in operation:
        return "attention"
    return "products" if any(name in operation for name in ("mm", "linear", "matmul")) else "other"


def counts(work: Prefill, skips: list[float], systems=("dense", "masked", "compact")) -> pd.DataFrame:
    """FLOPs of a prefill, by the counter (with eager attention) and in closed form; memory over dense; K/V bytes."""
    subject, model, rows = work.subject, work.subject.model, []
    weights = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    own, dense_peak = model.config._attn_implementation, None
    for system, skip in [(s, k) for s in systems for k in ([0.0] if s == "dense" else skips)]:
        with subject.as_system(system, skip, work.tokens):
            model.set_attn_implementation("eager")
            with FlopCounterMode(display=False) as counter:
                model(work.ids, use_cache=False, logits_to_keep=1)
            model.set_attn_implementation(own)
        with subject.as_system(system, skip, work.tokens), PeakMemory() as memory:
            cache = model(work.ids, use_cache=True, logits_to_keep=1).past_key_values
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        dense_peak = memory.peak if dense_peak is None else dense_peak
        head = 2 * model.config.hidden_size * model.config.vocab_size
        body = flops_per_token(model.config, subject.active(skip), work.length / 2) - head
        body += 0 if system == "dense" else router_flops(subject.routing.router)
        rows.append({"model": subject.name, "system": system, "skip": skip, "batch": work.batch, "length": work.length,
                     "counted_gflop": counter.get_total_flops() / 1e9,
                     "closed_form_gflop": float(body) * work.batch * work.length / 1e9, "kv_mb": kv / 1e6,
                     "memory_over_dense": (weights + memory.peak) / (weights + dense_peak) - 1})
    return pd.DataFrame(rows)
