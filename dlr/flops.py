"""Floating-point operations of a decoder, in closed form.

A multiply-add counts as two operations. Norms, activations and the softmax are left out, as is usual.
"""

import torch


def flops_per_token(config, active_layers, context):
    """Operations one token costs: `active_layers` of the layers in full, of the others their keys and values (K/V
    complete), and the output head.

    Args:
        config: a transformers configuration (sizes of a Llama-like decoder).
        active_layers, context: numbers or tensors `[n]`; `context` is how many positions the token attends to.
    """
    text = config.get_text_config()
    d, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or d // heads
    kv = 2 * 2 * d * head * (getattr(text, "num_key_value_heads", None) or heads)          # k_proj, v_proj
    attention = 2 * 2 * d * head * heads + 4 * head * heads * context                      # q_proj, o_proj; scores, values
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * d
    gated = any(name in text.model_type for name in ("llama", "mistral", "qwen", "gemma", "phi3", "olmo", "smol"))
    mlp = 2 * d * inner * (3 if gated else 2)
    return active_layers * (attention + mlp) + text.num_hidden_layers * kv + 2 * d * text.vocab_size


def router_flops(router) -> int:
    """Operations the router costs a token."""
    return 2 * sum(p.numel() for name, p in router.named_parameters() if p.ndim == 2 and name.startswith("net"))


def text_flops(config, active_layers: torch.Tensor, position: torch.Tensor, router: int = 0) -> float:
    """Operations of whole texts: `active_layers` and `position` `[n]`, and the router's own cost a token."""
    return float((flops_per_token(config, active_layers.double(), position.double() + 1) + router).sum())
