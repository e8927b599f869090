"""FLOPs a token, in closed form, for dense and routed decoders. One multiply-add counts as two.

K/V complete: a token that skips a layer still pays for that layer's key and value projections, so that later tokens find
them; it saves the queries, the attention scores, the output projection and the MLP.
"""

_UNGATED = {"gpt2", "gpt_neox", "opt", "falcon", "phi", "bloom", "gpt_neo", "gptj", "starcoder2"}


def layer_flops(config, context: float) -> tuple[float, float]:
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


def flops_per_token(config, context: float, keep_rate: list[float] | None = None, always_keep: int = 0,
                    keep_last: int = 0, router_hidden: int = 0) -> float:
    """FLOPs of one forward pass for one token, the output projection included; norms and activations are left out.

    Args:
        keep_rate: mean gate of each routable layer (two entries a layer, attention and MLP, average to one); None: dense.
        always_keep, keep_last: layers outside the routable ones. router_hidden: width of the router's hidden layers,
            0 where no router runs (static plans).

    Raises:
        ValueError: the keep rates do not fit the layers.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = text.num_hidden_layers
    keys_values, rest = layer_flops(text, context)
    head = 2 * text.hidden_size * text.vocab_size
    if keep_rate is None:
        return layers * (keys_values + rest) + head
    routable = layers - always_keep - keep_last
    if not routable or len(keep_rate) % routable:
        raise ValueError(f"{len(keep_rate)} keep rates do not fit {routable} routable layers.")
    kept = sum(keep_rate) * routable / len(keep_rate)
    router = 2 * (text.hidden_size * router_hidden + router_hidden**2 + router_hidden * len(keep_rate))
    return layers * keys_values + (always_keep + keep_last + kept) * rest + head + router
