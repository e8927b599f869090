"""FLOPs a token, in closed form, for dense and routed decoders. One multiply-add counts as two.

K/V complete: a token that skips a layer still pays for that layer's key and value projections, so
that later tokens find them; it saves the queries, the attention scores, the output projection and
the MLP.
"""

import torch

from dlr.routing.families import names
from dlr.routing.router import Router

_UNGATED = frozenset(names("ungated"))


def _text(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layer_flops(config, context: float | torch.Tensor) -> tuple:
    """One layer's FLOPs for one token: (key and value projections, rest of attention, MLP).

    Args:
        config: a transformers config.
        context: tokens attended to, the token itself included.
    """
    config = _text(config)
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or \
        getattr(config, "n_inner", None) or 4 * width
    matrices = 2 if config.model_type in _UNGATED else 3
    keys_values = 2 * 2 * width * kv_heads * head
    projections = 2 * 2 * width * heads * head
    scores = 2 * 2 * context * heads * head
    return keys_values, projections + scores, matrices * 2 * width * inner


def active_halves(gates: torch.Tensor, always: int,
                  units_per_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers whose attention ran, layers whose MLP ran), of gates or keep rates `[..., U]`.

    Args:
        always: layers outside the routable ones.
        units_per_layer: 1 where a gate decides on both halves, 2 where attention and MLP alternate.
    """
    gates = gates.double()
    attention = gates[..., ::units_per_layer].sum(-1)
    mlp = gates[..., units_per_layer - 1::units_per_layer].sum(-1)
    return always + attention, always + mlp


def flops_per_token(config, active: float | torch.Tensor | tuple,
                    context: float | torch.Tensor) -> float | torch.Tensor:
    """FLOPs one token costs: active layers in full, of the others keys and values, and the head.

    Args:
        active: how many layers it runs, or a pair (attention, MLP) as `active_halves` gives it.
        context: how many positions the token attends to. Both may be tensors `[n]`.
    """
    text = _text(config)
    attention_runs, mlp_runs = active if isinstance(active, tuple) else (active, active)
    keys_values, attention, mlp = layer_flops(text, context)
    return attention_runs * attention + mlp_runs * mlp + text.num_hidden_layers * keys_values + \
        2 * text.hidden_size * text.vocab_size


def plan_flops_per_token(config, context: float, keep_rate: list[float], always_keep: int = 0,
                         keep_last: int = 0, router: Router | None = None,
                         asked: bool = True) -> float:
    """FLOPs of one token under a plan's keep rates; norms and activations are left out.

    Args:
        keep_rate: mean gate of each unit: one a routable layer, or two (its attention, then its
            MLP).
        always_keep, keep_last: layers outside the routable ones.
        router: what is attached to the model; its skip adapters count under every plan.
        asked: whether the router made the plan, so that its network counts; not of static plans.

    Raises:
        ValueError: the keep rates do not fit the layers.
    """
    text = _text(config)
    routable = text.num_hidden_layers - always_keep - keep_last
    if routable < 1 or len(keep_rate) not in (routable, 2 * routable):
        raise ValueError(f"{len(keep_rate)} keep rates do not fit {routable} routable layers.")
    rates = torch.tensor(keep_rate, dtype=torch.double)
    attention, mlp = active_halves(rates, always_keep + keep_last, len(keep_rate) // routable)
    body = flops_per_token(text, (float(attention), float(mlp)), context)
    if router is None:
        return body
    skipped = len(keep_rate) - sum(keep_rate)
    return body + skipped * adapter_flops(router) + asked * router_flops(router)


def adapter_flops(router: Router) -> int:
    """FLOPs of the low-rank path past one skipped unit, for one token; 0 without adapters."""
    if router.skip is None:
        return 0
    return 2 * sum(p.numel() for p in router.skip.parameters() if p.ndim == 2) // router.units


def router_flops(router: Router) -> int:
    """FLOPs the router's network costs a token."""
    return 2 * sum(p.numel() for name, p in router.named_parameters() if p.ndim == 2
                   and name.startswith("net"))


def text_flops(config, active: torch.Tensor | tuple, position: torch.Tensor,
               router: int = 0) -> float:
    """FLOPs of whole texts; `router` is its cost a token, `active` is as in `flops_per_token`."""
    return float((flops_per_token(config, active, position.double() + 1) + router).sum())


def added_weights(router: Router, kind: str) -> dict[str, int]:
    """What a row of `kind` carries beside base and LoRA: numbers of parameters, and their bytes.

    Skip adapters go with every plan that skips, the router's network with its own plans alone.
    """
    adapters, network = [], []
    for name, parameter in router.named_parameters():
        (adapters if name.startswith("skip.") else network).append(parameter)
    adapters = adapters if kind not in ("base", "dense") else []
    network = network if kind in ("routed", "shuffled") else []
    return {"adapter_parameters": sum(p.numel() for p in adapters),
            "router_parameters": sum(p.numel() for p in network),
            "added_bytes": sum(p.nbytes for p in [*adapters, *network])}
