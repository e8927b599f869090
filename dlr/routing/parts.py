"""The parts of a decoder layer by what they do in compact execution, found by `families`."""

import inspect

from torch import nn

from dlr.routing.families import names


class NotCompactable(ValueError):
    """The model cannot run compacted without changing its results; the message says why."""


def _named(parent: nn.Module, column: str) -> list[nn.Module]:
    """The children of `parent` that a column of `families` names."""
    children = (getattr(parent, name, None) for name in names(column))
    return [child for child in children if isinstance(child, nn.Module)]


def _strange(parent: nn.Module, known: list[nn.Module]) -> list[str]:
    """Names of children not `known` that hold a matrix, as norms and activations do not."""
    def rowwise(module: nn.Module) -> bool:
        return all(tensor.dim() < 2 for tensor in (*module.parameters(), *module.buffers()))
    return [name for name, child in parent.named_children()
            if child not in known and not rowwise(child)]


def width_of(module: nn.Module, default: int) -> int:
    """Width of what a linear layer returns; `default` where it does not say."""
    widths = (getattr(module, name, None) for name in ("out_features", "nf"))
    return next((width for width in widths if isinstance(width, int)), default)


class Parts:
    """Attributes: attention, a module; query, fused, key_value, output, mlp, lists of modules.

    Raises:
        NotCompactable: the layer holds what may mix rows, or shares keys with another layer.
    """

    def __init__(self, layer: nn.Module):
        columns = ("attention", "mlp", "bare_mlp")
        attention, mlp, bare = (_named(layer, column) for column in columns)
        strange = _strange(layer, [*attention, *mlp, *bare])
        if len(attention) != 1 or strange or not (len(mlp) == 1 or len(bare) == 2):
            what = f"its {strange[0]!r}" if strange else "a part of it"
            raise NotCompactable(f"{type(layer).__name__} cannot run compacted: {what} may mix "
                                 "tokens in a way DLR does not know. Use execution='masked'.")
        self.attention = attention[0]
        self.mlp = mlp or bare
        self.query, self.fused, self.output, self.key_value = (
            _named(self.attention, column) for column in ("query", "fused", "output", "key_value"))
        strange = _strange(self.attention,
                           [*self.query, *self.fused, *self.output, *self.key_value])
        if len(self.output) != 1 or len(self.query) + len(self.fused) != 1 or strange:
            raise NotCompactable(f"{type(self.attention).__name__} cannot run compacted: DLR knows "
                                 "attention with one query (or fused) and one output projection, "
                                 f"not {strange or 'this one'}. Use execution='masked'.")
        if getattr(self.attention, "is_kv_shared_layer", False):
            raise NotCompactable(f"{type(self.attention).__name__} shares keys and values across "
                                 "layers, so a skipped layer would change another one. Use "
                                 "execution='masked'.")

    def blank_query_width(self, default: int) -> int:
        """Width of a query nobody reads: one head where attention takes any number of them."""
        norm = getattr(self.attention, "q_norm", None)
        width = getattr(self.attention, "head_dim", None)
        forward = inspect.unwrap(type(self.attention).forward)
        any_number = "hidden_shape" in forward.__code__.co_varnames
        norm_of_all = norm is not None and any(p.numel() != width for p in norm.parameters())
        full = width_of(self.query[0], default)
        heads = getattr(getattr(self.attention, "config", None), "num_attention_heads", None)
        return width if width and any_number and not norm_of_all and full == heads * width else full
