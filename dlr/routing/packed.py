"""4-bit weights on the CPU: bitsandbytes' fused kernel has no backward, so it is kept out.

On processors with AVX-512 BF16 the first evaluation pass of a `Linear4bit` repacks its weight for a
fused product. Training passes then use that product too, and every gradient that goes through it is
wrong. The plain way is exact on all machines.
"""

import logging

from torch import nn


def _not_the_missing_kernel(record: logging.LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


def silence_missing_kernel() -> None:
    """Keeps back bitsandbytes' line, at import, that it misses the fused kernel, unused here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_the_missing_kernel)


def keep_differentiable(model: nn.Module) -> nn.Module:
    """Makes 4-bit layers take the product that has a backward, and unpacks what was packed."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                # late: only 4-bit models need the library
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack
                module.weight.data, module.weight.quant_state = unpack(module.weight.data, state)
    return model
