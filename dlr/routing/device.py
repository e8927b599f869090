"""Where a model computes, and in what precision."""

import torch
from torch import nn


def fast_bf16() -> bool:
    """Whether bfloat16 products are faster here; emulated, they take about five times as long."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of `model` lie."""
    return next(model.parameters()).device


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes; accelerate may have its parameters elsewhere between calls."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return next(module.parameters()).device
