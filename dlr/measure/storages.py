"""How much memory a computation holds, and how many FLOPs it takes, counted tensor by tensor.

The same count holds for real tensors and for fake ones, which have shapes and no data: a model of
any size can so be measured on any machine. What a device needs beside tensors is not in it.
"""

import weakref
from collections import Counter

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# What a fake tensor answers where a program asks for a value: all tokens are real.
ANSWERS = {torch.bool: True, torch.int64: 1, torch.float32: 0.5}


def _attention_flops(query, key, value, *more, products: int = 2, **options) -> int:
    """Scores and values, over all places, as torch counts attention on an accelerator."""
    batch, heads, length, width = query.shape
    return products * 2 * batch * heads * length * key.shape[2] * width


def _attention_backward_flops(gradient, query, key, value, *more, **options) -> int:
    return _attention_flops(query, key, value, products=5)


def _packed_flops(states, packed, shape, *more, **options) -> int:
    """Of `states` `[..., k]` times a 4-bit matrix `[n, k]`."""
    return 2 * states.numel() * shape[0]


# torch's own table has no entry for the attention of CPUs, nor for 4-bit products
FLOPS = {"_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
         "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
         "gemm_4bit": _packed_flops}


class Storages(TorchDispatchMode):
    """While it is entered: the bytes of all storages that live, by part; their peak, and FLOPs.

    Attributes:
        part: what is allocated from now on belongs to.
        stage: peaks are noted by stage: name to Counter of bytes by part, at the stage's maximum.
    """

    def __init__(self, part: str = "activations"):
        super().__init__()
        self.part, self.stage = part, ""
        self.live, self.peaks, self.flops = Counter(), {}, 0
        self._parts: dict[int, tuple] = {}           # id of a storage -> (reference, bytes, part)

    def hold(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Counts a tensor's storage, once; a `part` moves what was counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._parts:
            if part is None:
                return
            self._forget(key)
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._parts[key] = reference, size, part or self.part
        self.live[part or self.part] += size

    def _forget(self, key: int) -> None:
        _, size, part = self._parts.pop(key)
        self.live[part] -= size

    def _note(self, passing: int = 0) -> None:
        """Notes a peak; `passing`: bytes that an operation holds while it runs."""
        total = self.live.total() + passing
        if total > self.peaks.get(self.stage, Counter()).total():
            self.peaks[self.stage] = self.live + Counter({self.part: passing})

    @property
    def peak(self) -> Counter:
        """Bytes by part at the highest peak of all stages."""
        return max(self.peaks.values(), key=Counter.total)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:              # asked all the time
            return args[0].fake_device
        out = _run(function, args, kwargs or {})
        for tensor in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        name = function.__name__.partition(".")[0]
        passing = 0
        if name == "gemm_4bit":                      # unpacks its matrix, out of our sight
            passing = args[2][0] * args[2][1] * args[0].element_size()
        self._note(passing)
        if name in FLOPS:
            self.flops += FLOPS[name](*args, **(kwargs or {}))
        elif function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **kwargs or {},
                                                                  out_val=out)
        return out


def _run(function, args: tuple, kwargs: dict):
    """The operation, with the answers of `ANSWERS` where fake tensors are asked for their data."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        if tensors:                                  # ids and masks are real, and so stay
            with _disable_current_modes():
                return function(*args, **kwargs)
    elif function is aten._local_scalar_dense.default:
        return ANSWERS[args[0].dtype]
    elif function is aten.index.Tensor:
        source, rows = args[0], args[1][0]
        if rows is not None and rows.dtype == torch.bool:
            return source.flatten(0, rows.ndim - 1).clone()
    return function(*args, **kwargs)


# -- fake models -------------------------------------------------------------------------------
def fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor on the CPU of the shape and type of `tensor`, which may lie on 'meta'."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def make_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Puts fake tensors in the place of all parameters and buffers; tied ones stay tied."""
    swapped = {}

    def fake(tensor):
        if id(tensor) not in swapped:
            new = fake_like(tensor, mode)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)           # a 4-bit weight's scales
            swapped[id(tensor)] = new
        return swapped[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)
    return model
