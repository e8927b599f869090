"""What DLR has to know of a causal LM's build: its decoder, the layers and their parts."""

from torch import nn

from dlr.routing.families import names
from dlr.routing.weights import causal_lm

HANDLE = "_dlr_routing"           # entry in the base model's __dict__


class NotRoutable(ValueError):
    """The model cannot be routed as asked; the message says why and what to do."""


def routing_of(model: nn.Module):
    """The `handle.Routing` of a model that has a router; raises NotRoutable where it has none."""
    try:
        return causal_lm(model).__dict__[HANDLE]
    except KeyError:
        name = type(causal_lm(model)).__name__
        message = f"No router is attached to this {name}; call dlr.attach(model)."
        raise NotRoutable(message) from None


def decoder_and_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the language model's decoder layers, and those layers.

    Raises:
        NotRoutable: `model` is no decoder-only language model.
    """
    base = causal_lm(model)
    config = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not (
            hasattr(base, "can_generate") and base.can_generate()) or count is None:
        raise NotRoutable(f"{type(base).__name__} is no decoder-only language model; DLR routes "
                          "the layers of causal LMs such as LlamaForCausalLM.")
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    # a vision or audio tower of as many layers lies outside the decoder
    for module in decoder.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise NotRoutable(f"{type(base).__name__} holds no list of {count} decoder layers.")


def sublayers(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The attention and the MLP of a layer; raises NotRoutable where they cannot be gated apart."""
    parts = [next((getattr(layer, name) for name in names(column) if hasattr(layer, name)), None)
             for column in ("attention", "mlp")]
    if None in parts or "residual" in parts[0].forward.__code__.co_varnames:
        raise NotRoutable("unit='sublayer' needs layers with separate attention and MLP modules "
                          f"that leave the residual alone; {type(layer).__name__} has none. Use "
                          "unit='layer'.")
    return parts[0], parts[1]


def projections_of(model: nn.Module) -> list[str]:
    """The names of attention and MLP projections inside the decoder layers of `model`, for LoRA."""
    _, layers = decoder_and_layers(model)
    present = {name.rsplit(".", 1)[-1] for name, _ in layers.named_modules()}
    return [name for name in names("lora") if name in present]


def refuse_layerdrop(decoder: nn.Module) -> None:
    """Refuses decoders that drop layers at random in training (OPT, XGLM, BioGPT)."""
    config = getattr(decoder, "config", None)
    rate = getattr(decoder, "layerdrop", getattr(config, "layerdrop", 0.0)) or 0.0
    if rate > 0:
        raise NotRoutable(f"{type(decoder).__name__} drops layers of its own in training "
                          f"(layerdrop={rate}), and a dropped layer has no gate. Set "
                          "model.config.layerdrop and the decoder's layerdrop to 0; stochastic "
                          "depth under DLR is dlr.routing.policy.LayerDrop.")
