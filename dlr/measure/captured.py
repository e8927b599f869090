"""Decoding by captured layers: the host launches one CUDA graph for each layer that the plan keeps.

A step of one token is bound by launches: a layer's kernels take less time than it takes to ask for
them. A captured layer is asked for once. A skipped one still writes its key and value, by a second,
small graph: of the layer's own code up to its attention. What stands around the layers
(embedding, mask, router, head) is launched as ever.

The dense baseline has the same graphs; `latency` sets beside both the dense model compiled whole.
"""

import copy
import itertools
from collections.abc import Callable
from threading import get_ident

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.benchmark import timer
from transformers import StaticCache

from dlr.measure.latency import Decode, Subject
from dlr.routing.compact import Reached, stop
from dlr.routing.decoder import routing_of
from dlr.routing.device import device_of
from dlr.routing.intercept import InPlace, intercepted
from dlr.routing.parts import Parts

WARM_UPS = 2                               # runs before a capture, in which libraries set up


class CudaGraph:
    """The kernels of one call of `run`, which `replay` launches at once. `result`: what it gave."""

    def __init__(self, run: Callable):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run()

    def replay(self) -> None:
        self.graph.replay()


class Inputs:
    """Arguments of a call, whose tensors stay in one place: graphs read what lies there."""

    def __init__(self, tree, shared: dict[str, list]):
        leaves, self.form = tree_flatten(tree)
        self.shared = shared
        self.leaves = [self._buffer(place, leaf) for place, leaf in enumerate(leaves)]

    def _buffer(self, place: int, leaf):
        """The buffer of one argument; all layers share those of what is the same for all."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key = place, tuple(leaf.shape), leaf.dtype
        return self.shared.setdefault(key, [leaf.clone(), leaf])[0]

    def take(self, tree) -> None:
        """Copies the tensors of a call of the same form into their buffers."""
        for place, (leaf, buffer) in enumerate(zip(tree_flatten(tree)[0], self.leaves)):
            if isinstance(leaf, torch.Tensor):
                entry = self.shared[place, tuple(leaf.shape), leaf.dtype]
                if place == 0 or entry[1] is not leaf:        # masks are copied once a step
                    buffer.copy_(leaf)
                    entry[1] = leaf

    @property
    def tree(self):
        return tree_unflatten(self.leaves, self.form)


class CapturedLayer(InPlace):
    """Runs a layer's steps of one token by graphs, in the place of its forward.

    Args:
        index: of the layer, in the cache.
        shared: buffers that all layers of a model share.
        graph: what captures a call; a stand-in in tests.
    """

    def __init__(self, layer, index: int, shared: dict, graph: type = CudaGraph):
        super().__init__(layer)
        self.attention = Parts(layer).attention
        self.index, self.shared, self.graph = index, shared, graph
        self.captured: dict = {}

    def __call__(self, hidden, *args, **kwargs):
        caches = [value for value in kwargs.values() if getattr(value, "is_compileable", False)]
        if hidden.shape[1] > 1 or not caches or not caches[0].layers[self.index].is_initialized:
            return self.own(hidden, *args, **kwargs)
        block = get_ident(), self.attention
        if intercepted.begun.get(block, stop) is not stop:        # run part by part
            return self.own(hidden, *args, **kwargs)
        # where it ends at attention, a graph for the key and value alone
        key = block in intercepted.begun, hidden.shape[0], id(caches[0])
        call = (hidden, args, kwargs)
        if key not in self.captured:
            self.captured[key] = self._capture(call, caches[0].layers[self.index])
        inputs, graph = self.captured[key]
        inputs.take(call)
        graph.replay()
        if isinstance(graph.result, Reached):
            raise Reached(*graph.result.args)
        return graph.result

    def _capture(self, call, cache_layer) -> tuple[Inputs, CudaGraph]:
        inputs = Inputs(call, self.shared)
        inputs.take(call)

        def run():
            hidden, args, kwargs = inputs.tree
            try:
                return self.own(hidden, *args, **kwargs)
            except Reached as reached:
                return reached
        length = cache_layer.cumulative_length.clone()
        for _ in range(WARM_UPS):
            run()
            cache_layer.cumulative_length.copy_(length)       # what it wrote is written again
        return inputs, self.graph(run)


class captured:
    """Context: layers of a routed model are captured at their first step and launched after that.

    Graphs are kept between blocks, for the caches they were made with.
    """

    def __init__(self, routing, graph: type = CudaGraph):
        shared: dict = {}
        self.layers = [CapturedLayer(layer, index, shared, graph)
                       for index, layer in enumerate(routing.layers)]

    def __enter__(self):
        for layer in self.layers:
            layer.install()
        return self

    def __exit__(self, *error):
        for layer in self.layers:
            layer.remove()


class CapturedDecode(Decode):
    """`Decode` by captured layers, and beside it the dense model compiled whole.

    Raises:
        ValueError: the model is on no CUDA device.
    """
    label = "captured decode"
    systems = ("dense", "compiled", "truncation", "compact")

    def __init__(self, subject: Subject, batch: int, length: int, steps: int = 16,
                 graph: type = CudaGraph, backend: str = "inductor"):
        device = device_of(subject.model).type
        if graph is CudaGraph and device != "cuda":
            raise ValueError(f"captured=true launches CUDA graphs, and this model is on {device!r}."
                             " Leave captured out, or run this where there is a CUDA device.")
        super().__init__(subject, batch, length, steps)
        self.layers = captured(subject.routing, graph)
        self.compiled = compiled_twin(subject.model, backend)

    def _new_cache(self):
        return StaticCache(config=self.subject.model.config,
                           max_cache_len=self.length + self.steps)

    def _rewind(self, cache) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.length)

    def run(self) -> dict[str, float]:
        """Seconds a step by part; of the compiled model end to end alone."""
        if self.subject.system != "compiled":
            with self.layers:
                return super().run()
        cache = self._context(self.subject.layers)
        start = timer()
        for step in range(self.steps):
            self.compiled(self._token(step), past_key_values=cache, logits_to_keep=1)
        seconds = timer() - start
        self._rewind(cache)
        return {"end to end": seconds / self.steps}


def compiled_twin(model, backend: str = "inductor"):
    """The dense model with the same weights and no router, compiled whole."""
    kept = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, kept)
    routing_of(twin).detach()
    options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    return torch.compile(twin, backend=backend, dynamic=False, **options)
