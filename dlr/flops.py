"""FLOPs a token, in closed form, for dense and routed decoders. One multiply-add counts as two.

K/V complete: a token that skips a layer still pays for that layer's key and value projections, so that later tokens find
them; it saves the queries, the attention scores, the output projection and the MLP.
"""

import torch

_UNGATED = {"gpt2", "gpt_neox", "opt", "falcon", "phi", "bloom", "gpt_neo", "gptj", "starcoder2"}


def layer_flops(config, context: float | torch.Tensor) -> tuple:
    """(key and value projections, everything else) of one decoder layer for one token that attends to `context` tokens.

    Args:
        config: a transformers text config; context: tokens attended to, the token itself included.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or \
        getattr(config, "n_inner", None) or 4 * width
    matrices = 2 if config.model_type in _UNGATED else 3
    keys_values = 2 * 2 * width * kv_heads * head
    projections = 2 * 2 * width * heads * head
    scores = 2 * 2 * context * heads * head
    return keys_values, projections + scores + matrices * 2 * width * inner


def flops_per_token(config, active_layers: float | torch.Tensor, context: float | torch.Tensor) -> float | torch.Tensor:
    """FLOPs one token costs: `active_layers` of the layers in full, of the others their keys and values, and the head.

    Args:
        active_layers, context: numbers, or tensors `[n]`; `context` is how many positions the token attends to.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    keys_values, rest = layer_flops(text, context)
    return active_layers * rest + text.num_hidden_layers * keys_values + 2 * text.hidden_size * text.vocab_size


def plan_flops_per_token(config, context: float, keep_rate: list[float], always_keep: int = 0, keep_last: int = 0,
                         router_hidden: int = 0) -> float:
    """FLOPs of one token under a plan's keep rates; norms and activations are left out.

    Args:
        keep_rate: mean gate of each routable layer (two entries a layer, attention and MLP, average to one).
        always_keep, keep_last: layers outside the routable ones. router_hidden: width of the router's hidden layers,
            0 where no router runs (static plans).

    Raises:
        ValueError: the keep rates do not fit the layers.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    routable = text.num_hidden_layers - always_keep - keep_last
    if not routable or len(keep_rate) % routable:
        raise ValueError(f"{len(keep_rate)} keep rates do not fit {routable} routable layers.")
    active = always_keep + keep_last + sum(keep_rate) * routable / len(keep_rate)
    router = 2 * (text.hidden_size * router_hidden + router_hidden**2 + router_hidden * len(keep_rate))
    return flops_per_token(text, active, context) + router


def router_flops(router) -> int:
    """FLOPs the router costs a token."""
    return 2 * sum(p.numel() for name, p in router.named_parameters() if p.ndim == 2 and name.startswith("net"))


def text_flops(config, active_layers: torch.Tensor, position: torch.Tensor, router: int = 0) -> float:
    """FLOPs of whole texts: `active_layers` and `position` `[n]`, and the router's own cost a token."""
    return float((flops_per_token(config, active_layers.double(), position.double() + 1) + router).sum())
