"""Compact execution: each layer computes only the rows its plan keeps, with the family's own code.

All decisions are known after layer K, so the kept rows of every layer are found at once, with one host sync. While a
plan runs, a routable layer's query and output projections and its MLP compute the kept rows (gather, product, scatter),
its attention attends for them alone, and its key and value projections run for every row: K/V complete. Norms, rotary
embeddings, soft-capping, windows, quantised and LoRA-wrapped linears stay the family's own. A layer that no row runs is
not called: its keys and values wait (see `pending`). Where nothing is skipped, the layer is left alone.
"""

import torch
from torch import nn

from dlr.execution import argument_names
from dlr.pending import PendingLayer, joined, pending_layer, positional
from dlr.rows import Rows, active, attention_function, selective

QUERY, OUTPUT = ("q_proj",), ("o_proj", "out_proj", "dense", "c_proj")
FUSED = ("qkv_proj", "query_key_value", "c_attn")          # compute keys and values too, so they see every row
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward")
BARE_MLP = ("fc1", "fc2")
PLAIN_SHARE = 0.95          # kept share from which gathering costs more than the rows it saves
CACHE_NAMES = ("past_key_values", "layer_past")


class NotCompactable(ValueError):
    """The model cannot run compacted without changing its results; the message says why."""


def _named(parent: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [getattr(parent, name) for name in names if isinstance(getattr(parent, name, None), nn.Module)]


def _rowwise(module: nn.Module) -> bool:
    """Norms, activations, dropout: nothing with a matrix in it."""
    return all(p.dim() < 2 for p in module.parameters()) and all(b.dim() < 2 for b in module.buffers())


class Parts:
    """The modules of one decoder layer that compute kept rows only, found by their names.

    Raises:
        NotCompactable: the layer holds something that may mix rows, or shares keys and values with another layer.
    """

    def __init__(self, layer: nn.Module):
        attention, mlp = _named(layer, ATTENTION), _named(layer, MLP)
        bare = _named(layer, BARE_MLP)
        known = {*attention, *mlp, *bare}
        strange = [name for name, child in layer.named_children() if child not in known and not _rowwise(child)]
        if len(attention) != 1 or strange or not (len(mlp) == 1 or len(bare) == 2):
            what = f"its {strange[0]!r}" if strange else "a part of it"
            raise NotCompactable(f"{type(layer).__name__} cannot run compacted: {what} may mix tokens in a way DLR does "
                                 "not know. Use execution='masked'.")
        self.attention = attention[0]
        query, output, fused = (_named(self.attention, names) for names in (QUERY, OUTPUT, FUSED))
        inner = {*query, *output, *fused, *_named(self.attention, ("k_proj", "v_proj"))}
        strange = [n for n, child in self.attention.named_children() if child not in inner and not _rowwise(child)]
        if len(output) != 1 or len(query) + len(fused) != 1 or strange:
            raise NotCompactable(f"{type(self.attention).__name__} cannot run compacted: DLR knows attention with one "
                                 f"query (or fused) and one output projection, not {strange or 'this one'}. "
                                 "Use execution='masked'.")
        if getattr(self.attention, "is_kv_shared_layer", False):
            raise NotCompactable(f"{type(self.attention).__name__} shares keys and values across layers, so a skipped "
                                 "layer would change another one. Use execution='masked'.")
        self.query, self.output, self.mlp = query, output, mlp or bare


def _width(module: nn.Module, default: int) -> int:
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return default


class _OneLayer:
    """A cache of one layer, for a layer that is run for its keys and values only."""

    def __init__(self, layer):
        self.layer = layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layer.update(key_states, value_states)


def _rows_from(hidden: torch.Tensor, start: int) -> Rows:
    """The rows of `hidden` `[b, s, d]` from place `start` of each sequence on."""
    batch, length = hidden.shape[:2]
    place = torch.arange(start, length, device=hidden.device).expand(batch, -1)
    flat = (place + length * torch.arange(batch, device=hidden.device).unsqueeze(1)).flatten()
    return Rows(flat, place, torch.arange(len(flat), device=hidden.device), batch, length, start)


class CompactLayer:
    """Runs one routable layer by its rows. Stands in as the layer's `forward` while a compact pass is on.

    Raises:
        NotCompactable: see `Parts`.
    """

    def __init__(self, routing, layer: nn.Module, index: int, width: int):
        self.routing, self.layer, self.index, self.parts = routing, layer, index, Parts(layer)
        self.place = index - routing.first
        self.names = argument_names(layer)[1:]
        self.cache_name = next((name for name in CACHE_NAMES if name in self.names), CACHE_NAMES[0])
        self.returns_tuple: bool | None = None                    # known once the layer has run
        self.attention_modules = {m: selective(m, _width(m, width)) for m in (*self.parts.query, *self.parts.output)}
        self.mlp_modules = {m: selective(m, _width(m, width)) for m in self.parts.mlp}

    def install(self) -> None:
        """Puts this in the layer's place until `remove`."""
        self.function = attention_function(self.parts.attention)  # asked once a pass: a model can change it
        self.before = self.layer.__dict__.get("forward")
        self.own = self.layer.forward
        self.layer.__dict__["forward"] = self

    def remove(self) -> None:
        """Gives the layer its own forward back."""
        if self.before is None:
            self.layer.__dict__.pop("forward", None)
        else:
            self.layer.__dict__["forward"] = self.before

    def __call__(self, hidden=None, *args, **kwargs):
        current = self.routing._pass
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        kwargs |= dict(zip(self.names, args))
        if current is None or current.rows is None:
            return self.own(hidden, **kwargs)
        parts = self.routing.units_per_layer
        attention, mlp = current.rows[self.place * parts], current.rows[self.place * parts + parts - 1]
        nothing = attention is not None and mlp is not None and not attention.count and not mlp.count
        if nothing and self._wait(hidden, kwargs):
            return self._output(self.routing.router.skipped(self.place, hidden) if parts == 1 else hidden)
        slot = self._slot(kwargs.get(self.cache_name))
        waiting = slot.take() if slot is not None else []
        if parts == 2:
            return self.run(hidden, kwargs, attention, mlp, waiting)
        if attention is not None and attention.count > PLAIN_SHARE * attention.batch * attention.length:
            attention = mlp = None
        out = self.run(hidden, kwargs, attention, mlp, waiting)
        if current.rows[self.place] is None:
            return out
        kept = torch.where(current.keep[..., self.place:self.place + 1], out[0] if self.returns_tuple else out,
                           self.routing.router.skipped(self.place, hidden))
        return (kept, *out[1:]) if self.returns_tuple else kept

    def run(self, hidden: torch.Tensor, kwargs: dict, attention: Rows | None, mlp: Rows | None, waiting: list):
        """The layer's output with only the given rows of `hidden` `[b, s, d]` computed; None computes all of them.

        `waiting` holds earlier inputs whose keys and values are owed: they go in front, and none of their rows is kept.
        """
        extra = sum(earlier.shape[1] for earlier, _ in waiting)
        if extra:
            now = positional(kwargs)
            kwargs = kwargs | {name: joined([*(p[name] for _, p in waiting), now[name]]) for name in now}
            hidden = torch.cat([*(earlier for earlier, _ in waiting), hidden], 1)
            attention, mlp = (_rows_from(hidden, extra) if r is None else r.shifted(extra) for r in (attention, mlp))
        rows = {self.parts.attention: attention}
        modules = {}
        for chosen, group in ((attention, self.attention_modules), (mlp, self.mlp_modules)):
            if chosen is not None:
                modules |= group
                rows |= dict.fromkeys(group, chosen)
        with active(modules, rows, self.parts.attention, self.function if attention is not None else None):
            out = self.own(hidden, **kwargs)
        self.returns_tuple = isinstance(out, tuple)
        if not extra:
            return out
        return (out[0][:, extra:], *out[1:]) if self.returns_tuple else out[:, extra:]

    def project(self, cache_layer, hidden: torch.Tensor, positions: dict) -> None:
        """Appends the keys and values of `hidden` `[b, s, d]` to `cache_layer`, and computes nothing else."""
        nobody, self.function = _rows_from(hidden, hidden.shape[1]), attention_function(self.parts.attention)
        with torch.no_grad():
            self.run(hidden, positions | {self.cache_name: _OneLayer(cache_layer), "attention_mask": None}, nobody, nobody, [])

    def _slot(self, cache):
        layers = getattr(cache, "layers", ())
        layer = layers[self.index] if self.index < len(layers) else None
        return layer if isinstance(layer, PendingLayer) else None

    def _wait(self, hidden: torch.Tensor, kwargs: dict) -> bool:
        """Puts the layer off: no row runs it. False where it must run all the same for its keys and values."""
        if self.returns_tuple is None or self.function is None:
            return False
        cache = kwargs.get(self.cache_name)
        if cache is None:
            return True                                            # no row, no cache: nobody will read the keys
        slot = pending_layer(cache, self.index, self.project)
        if slot is not None:
            slot.owe(hidden, positional(kwargs))
        return slot is not None

    def _output(self, hidden: torch.Tensor):
        return (hidden, None) if self.returns_tuple else hidden


def compact_layers(routing) -> list[CompactLayer]:
    """One CompactLayer a routable layer of `routing`.

    Raises:
        NotCompactable: some layer cannot be run by rows.
    """
    width = routing.router.width
    return [CompactLayer(routing, routing.layers[index], index, width) for index in range(routing.first, routing.last)]
