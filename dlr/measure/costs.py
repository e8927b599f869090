"""Where a prefill's time, operations and memory go, beside what the layer count predicts."""

import itertools
import statistics
import weakref

import pandas as pd
import torch
# this timer waits for an accelerator before it reads the clock
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from dlr.measure.flops import adapter_flops, flops_per_token, router_flops
from dlr.measure.latency import Prefill
from dlr.routing.compact import OVERHEAD
from dlr.routing.device import device_of
from dlr.routing.policy import RecordedPlan

KINDS = ("products", "attention", "other")


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes of tensors made inside the block and alive at once.

    torch counts this on accelerators only, and there with what its allocator holds in reserve.
    """

    def __enter__(self):
        self.now = self.peak = 0
        self.known: set[int] = set()
        return super().__enter__()

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key, size = storage._cdata, storage.nbytes()
            # new memory only: arguments and views share storage that is counted already
            if key not in given and key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)
        return out


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in torch.utils._pytree.tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)]


def row_costs(work: Prefill, skips: list[float], repeats: int = 9) -> pd.DataFrame:
    """What the matrix library leaves of the bound: a row costs more where there are few.

    Times the layer's largest product alone, in turns, at the rows each layer of the plan keeps.

    Columns: skip; bound; product_bound, the speed-up over dense if every layer's time were in
    proportion to its largest product's; row_cost, the time of a kept row relative to a full pass's.
    """
    subject = work.subject
    layer = subject.routing.layers[subject.routing.first]
    largest = max((m for m in layer.modules() if isinstance(m, torch.nn.Linear)),
                  key=lambda m: m.weight.numel())
    total = work.tokens
    plans = {skip: subject.plan(skip, total) for skip in skips}
    kept = {skip: [int(count) for count in plan[torch.arange(total) % len(plan)].sum(0)]
            for skip, plan in plans.items()}
    seconds = _product_seconds(largest, {total, *itertools.chain(*kept.values())}, repeats)
    always = subject.layers - subject.routing.units
    rows = []
    for skip in skips:
        whole_layers = sum(seconds[count] for count in kept[skip]) / seconds[total]
        rows.append({"skip": skip, "bound": subject.bound(skip),
                     "product_bound": subject.layers / (always + whole_layers),
                     "row_cost": whole_layers / (sum(kept[skip]) / total)})
    return pd.DataFrame(rows)


@torch.no_grad()
def _product_seconds(product: torch.nn.Linear, counts: set[int], repeats: int) -> dict[int, float]:
    """Median seconds of `product` on each number of rows, in turns, the first of which warms up."""
    weight = product.weight
    x = torch.randn(max(counts), product.in_features, dtype=weight.dtype, device=weight.device)
    seconds: dict[int, list[float]] = {count: [] for count in sorted(counts - {0})}
    for _ in range(repeats + 1):
        for count, turns in seconds.items():
            start = timer()
            product(x[:count])
            turns.append(timer() - start)
    return {0: 0.0} | {count: statistics.median(turns[1:]) for count, turns in seconds.items()}


def rows_overhead(work: Prefill, repeats: int = 9) -> dict:
    """What running a layer by rows costs beside its products, under a plan that skips one token.

    Returns:
        milliseconds a layer, against the dense layer in the same turns (median); flops, the
        products that take as long here; guard, the flops that compact execution reckons with
        (`dlr.routing.compact.OVERHEAD`).
    """
    routing, device = work.subject.routing, device_of(work.subject.model).type
    gates = torch.ones(work.length, routing.units)
    gates[0] = 0
    guard = OVERHEAD.get(device, OVERHEAD["cuda"])
    extra, dense = [], []
    for turn in range(repeats + 1):
        with torch.no_grad(), routing.at(policy=RecordedPlan(gates), execution="compact"):
            OVERHEAD[device] = 0.0                               # else the layer is left alone
            try:
                by_rows = work.run()["layers"]
            finally:
                OVERHEAD[device] = guard
        with torch.no_grad(), routing.disabled():
            plain = work.run()["layers"]
        if turn:                                                 # the first one warms up
            extra.append((by_rows - plain) / routing.units)
            dense.append(plain / work.subject.layers)
    weights = sum(p.numel() for p in routing.layers[routing.first].parameters())
    seconds = statistics.median(extra)
    flops = 2 * weights * work.tokens * seconds / statistics.median(dense)
    return {"milliseconds": 1e3 * seconds, "flops": flops, "guard": guard}


def profile_prefill(work: Prefill, skips: list[float], repeats: int = 3) -> pd.DataFrame:
    """Where a prefill's time goes, by torch.profiler: ms of products, attention and all the rest.

    Each stands beside the dense model's time scaled by the layers run (`<kind>_at_bound`). Compare
    within the table only: profiling takes time, most of it between operations (not counted here).
    """
    turns = [{case: _profiled(work, *case) for case in (("dense", 0.0),
                                                        *(("compact", skip) for skip in skips))}
             for _ in range(repeats)]
    rows: list[dict] = []
    for system, skip in turns[0]:
        median = {kind: statistics.median(turn[system, skip][kind] for turn in turns)
                  for kind in KINDS}
        rows.append({"system": system, "skip": skip} | median)
        rows[-1] |= {f"{kind}_at_bound": rows[0][kind] / work.subject.bound(skip) for kind in KINDS}
    return pd.DataFrame(rows)


def _profiled(work: Prefill, system: str, skip: float) -> dict[str, float]:
    """Milliseconds by kind of operation in one run."""
    on_gpu = device_of(work.subject.model).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    with work.subject.as_system(system, skip, work.tokens), profiler:
        work.run()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        # operations, not the kernels they launch
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[_kind(event.key)] += (event.self_device_time_total if on_gpu
                                        else event.self_cpu_time_total) / 1e3
    return spent


def _kind(operation: str) -> str:
    if "attention" in operation:
        return "attention"
    return "products" if any(name in operation for name in ("mm", "linear", "matmul")) else "other"


def flops_and_memory(work: Prefill, skips: list[float],
                     systems=("dense", "masked", "compact")) -> pd.DataFrame:
    """FLOPs of a prefill, counted (eager attention) and in closed form; memory over dense; K/V."""
    subject, model = work.subject, work.subject.model
    router = subject.routing.router
    weights = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    added = sum(p.nbytes for p in router.parameters())           # which the dense model has not
    attention = model.config._attn_implementation
    peaks, rows = [], []
    for system, skip in [(name, ratio) for name in systems
                         for ratio in ([0.0] if name == "dense" else skips)]:
        with subject.as_system(system, skip, work.tokens):
            # the counter sees no FLOPs in other attention implementations
            model.set_attn_implementation("eager")
            with FlopCounterMode(display=False) as counter:
                model(work.ids, use_cache=False, logits_to_keep=1)
            model.set_attn_implementation(attention)
        with subject.as_system(system, skip, work.tokens), PeakMemory() as memory:
            cache = model(work.ids, use_cache=True, logits_to_keep=1).past_key_values
        peaks.append(memory.peak)
        keys_values = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        head = 2 * model.config.hidden_size * model.config.vocab_size
        body = flops_per_token(model.config, subject.active(skip), work.length / 2) - head
        if system != "dense":
            body += router_flops(router) + subject.routing.units * skip * adapter_flops(router)
        rows.append({"model": subject.name, "system": system, "skip": skip, "batch": work.batch,
                     "length": work.length, "counted_gflop": counter.get_total_flops() / 1e9,
                     "closed_form_gflop": float(body) * work.tokens / 1e9,
                     "kv_mb": keys_values / 1e6,
                     "added_mb": 0.0 if system == "dense" else added / 1e6,
                     "memory_over_dense": (memory.peak - peaks[0] + added * (system != "dense"))
                     / (weights - added + peaks[0])})
    return pd.DataFrame(rows)
