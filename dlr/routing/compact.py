"""Compact execution: each layer computes only the rows its plan keeps, with the family's own code.

All decisions are known after layer K, so the kept rows of all layers are found with one host sync.
A routable layer then runs twice. The first run takes every row, makes the keys and values of all,
and stops at attention. The second run takes the kept rows as one sequence, whose attention reads
the keys and values of all. Norms, rotary embeddings, soft-capping, windows, quantised and
LoRA-wrapped linears stay the family's own code.

Where attention and MLP keep different rows, or the attention function cannot be exchanged, the
layer runs once, part by part: its query and output projections and its MLP gather the kept rows,
compute them and scatter them.

A layer that no row runs is not called: its keys and values wait (see `owed`). A layer that skips
too little to pay for a second run is left alone.
"""

from dataclasses import dataclass
from threading import get_ident

import torch
from torch import nn

from dlr.routing.attention import attend
from dlr.routing.families import names
from dlr.routing.intercept import InPlace, attention_function, intercepted, own_forwards
from dlr.routing.masked import argument_names
from dlr.routing.owed import PendingLayer, behind, by_row, pending_layer, positional
from dlr.routing.parts import Parts, width_of
from dlr.routing.rows import Rows, selective

# Running a layer by rows costs as much extra time as products of so many FLOPs: 2 ms on two CPU
# cores (measured), about 0.3 ms of kernel launches at 150 TFLOP/s on an accelerator (estimated).
OVERHEAD = {"cpu": 1.5e8, "cuda": 5e10}


class _OneLayer:
    """A cache of one layer, for a layer that is run for its keys and values only."""

    def __init__(self, layer):
        self.layer = layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layer.update(key_states, value_states)


class Reached(Exception):
    """Ends a layer's run at its attention; carries what attention was given."""


def stop(module, query, key, value, attention_mask, **kwargs):
    raise Reached(query, key, value, attention_mask)


@dataclass(frozen=True)
class _Blank:
    """A projection that computes nothing: zeros `[..., width]`."""
    width: int

    def __call__(self, x, *args, **kwargs):
        return x.new_zeros(*x.shape[:-1], self.width)


class CompactLayer(InPlace):
    """Runs one routable layer by its rows, in the place of its `forward` in compact passes.

    Raises:
        NotCompactable: see `Parts`.
    """

    def __init__(self, routing, layer: nn.Module, index: int, width: int):
        super().__init__(layer)
        self.routing = routing
        self.index, self.place = index, index - routing.first
        self.width = width
        self.names = argument_names(layer)[1:]
        self.cache_name = next((name for name in names("cache") if name in self.names),
                               names("cache")[0])
        self.returns_tuple: bool | None = None                    # known once the layer has run
        self._find()

    def _find(self) -> None:
        self.parts = parts = Parts(self.module)
        self.attention = parts.attention
        self.children = self._inside()
        # packed 4-bit weights count as fewer than they are
        self.weights = sum(p.numel() for p in self.module.parameters())
        self.no_query = {m: _Blank(parts.blank_query_width(self.width)) for m in parts.query}
        key_makers = (*parts.key_value, *parts.fused)
        self.no_keys = {m: _Blank(width_of(m, self.width)) for m in key_makers}
        self.extra_outputs = dict.fromkeys((*parts.query, *parts.output), 0)
        self.touched = (self.attention, *self.no_query, *self.no_keys, *parts.output, *parts.mlp)

    def _inside(self) -> tuple:
        return *self.module._modules.values(), *self.attention._modules.values()

    def tidy(self) -> None:
        """Removes what an interrupt of this thread may have left on the layer's modules."""
        block = get_ident(), self.attention
        if block in intercepted.begun:
            own_forwards(self.touched, everybody=False)
            intercepted.begun.pop(block, None)

    def refresh(self) -> None:
        """Finds the parts again where LoRA was added, merged or removed; raises NotCompactable."""
        if self._inside() != self.children:
            self._find()

    def install(self, functions: dict) -> None:
        """Puts this in the place of the layer's forward until `remove`, for a compact pass.

        `functions`: attention functions this pass has looked up; between passes they may change.
        """
        kind = type(self.attention), id(getattr(self.attention, "config", None))
        if kind not in functions:
            functions[kind] = attention_function(self.attention)
        self.function = functions[kind]
        super().install()

    def __call__(self, hidden=None, *args, **kwargs):
        plan = self.routing.current  # None in a thread whose pass is dense
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        kwargs |= dict(zip(self.names, args))
        if plan is None or not plan.compact:
            return self.own(hidden, **kwargs)
        self.routing.planned(plan)
        units = self.routing.units_per_layer
        rows = plan.rows[self.place * units:(self.place + 1) * units]
        no_row_runs = all(part is not None and not part.count for part in rows)
        if no_row_runs and self._wait(hidden, kwargs):
            skipped = self.routing.router.skipped(self.place, hidden) if units == 1 else hidden
            return self._output(skipped)
        slot = self._slot(kwargs.get(self.cache_name))
        keys_owed = slot is not None and bool(slot.waiting)
        plain = units == 1 and self._plain(rows[0], hidden.device.type)
        # Two runs need one gate for the whole layer, an attention function that can be exchanged,
        # and an output form that is known or that this run will show. They pay where enough rows
        # are skipped; otherwise owed inputs go along with the one run, for their keys and values.
        form_known = self.returns_tuple is not None or rows[0] is None or rows[0].count
        can_run_twice = units == 1 and self.function is not None and form_known
        if can_run_twice and (keys_owed or not plain) and by_row(kwargs, hidden):
            waiting = slot.take() if keys_owed else []
            if plain:
                return self._blend(plan, hidden, self.run_behind(waiting, hidden, kwargs))
            return self._output(self.run(hidden, kwargs, rows[0], waiting))
        if keys_owed:
            slot.complete()
        attention, mlp = (None, None) if plain else (rows[0], rows[-1])
        return self._blend(plan, hidden, self.run_parts(hidden, kwargs, attention, mlp))

    def _plain(self, rows: Rows | None, device: str) -> bool:
        """Whether so few rows are skipped that running the layer by rows costs more."""
        if rows is None:
            return True
        saved = 2 * self.weights * (rows.batch * rows.length - rows.count)
        return rows.count > 0 and saved < OVERHEAD.get(device, OVERHEAD["cuda"])

    def run(self, hidden: torch.Tensor, kwargs: dict, rows: Rows | None,
            waiting: list) -> torch.Tensor:
        """The layer's output `[b, s, d]`, with `rows` of `hidden` `[b, s, d]` computed (None: all).

        `waiting` holds earlier inputs whose keys and values are owed. They are projected together
        with `hidden`, in front of it.
        """
        places = positional(kwargs)
        inputs, all_places = behind(waiting, hidden, places)
        owed_length = inputs.shape[1] - hidden.shape[1]
        query, key, value, mask = self._keys(inputs, kwargs | all_places)
        rows = rows if rows is not None else Rows.every(*hidden.shape[:2], hidden.device)
        if not rows.count:
            return self.routing.router.skipped(self.place, hidden)

        place = kwargs.get("position_ids")

        def attention(module, kept, *keys_and_mask, **options):
            if self.parts.fused:
                kept = rows.chosen(query[:, :, owed_length:])
            else:
                kept = rows.by_sequence(kept)
            out = attend(self.function, rows, module, kept, key, value, mask, place, **options)
            return rows.in_one(out), None

        changed = {name: rows.positions(part) for name, part in places.items()}
        changed |= {self.cache_name: None, "attention_mask": None}
        with intercepted(self.no_keys, self.attention, attention):
            out = self.own(rows.gather(hidden), **kwargs | changed)
        self.returns_tuple = isinstance(out, (tuple, list))
        # skip adapters too cost nothing for rows that run the layer
        others = rows.others(hidden)
        others = self.routing.router.skipped(self.place, others) if len(rows.rest) else others
        return rows.woven(out[0] if self.returns_tuple else out, others)

    def _keys(self, hidden: torch.Tensor, kwargs: dict) -> tuple:
        """Runs the layer up to its attention: (query, key, value, mask) as attention gets them.

        The query is zeros unless one fused projection makes it together with keys and values. A
        cache among `kwargs` has then taken the keys and values.
        """
        with intercepted(self.no_query, self.attention, stop):
            try:
                self.own(hidden, **kwargs)
            except Reached as reached:
                return reached.args
        raise RuntimeError(f"{type(self.attention).__name__} never called its attention function. "
                           "Use execution='masked'.")

    def run_behind(self, waiting: list, hidden: torch.Tensor, kwargs: dict):
        """The layer's own output of all `hidden`, in one run.

        Inputs that wait stand in front of it, for their keys and values alone.
        """
        inputs, places = behind(waiting, hidden, positional(kwargs))
        new = Rows.last(*inputs.shape[:2], hidden.shape[1], hidden.device)
        # mask and keys are those that all of `hidden` would meet alone
        out = self.run_parts(inputs, kwargs | places, new, new,
                             lambda own, rows, *given, **options: own(*given[:5], **options)[0])
        output = (out[0] if self.returns_tuple else out)[:, -hidden.shape[1]:]
        return (output, *out[1:]) if self.returns_tuple else output

    def run_parts(self, hidden: torch.Tensor, kwargs: dict, attention: Rows | None,
                  mlp: Rows | None, attend=attend):
        """The layer's own output; each part computes its rows only (None: all of them)."""
        forwards = {}
        projections = [*self.parts.query, *self.parts.output]
        for rows, modules in ((attention, projections), (mlp, self.parts.mlp)):
            for module in modules if rows is not None else ():
                width = width_of(module, self.width)
                forwards[module] = selective(module, rows, width, self.extra_outputs)

        def attends(module, query, key, value, mask, **options):
            shape = attention.batch, attention.length
            if not attention.count:
                return query.new_zeros(*shape, query.shape[1], value.shape[-1]), None
            out = attend(self.function, attention, module, attention.chosen(query), key, value,
                         mask, kwargs.get("position_ids"), **options)
            scattered = attention.scatter(attention.in_one(out).flatten(2), shape)
            return scattered.view(*shape, *out.shape[2:]), None

        exchange = self.function is not None and attention is not None
        if forwards or exchange:
            with intercepted(forwards, self.attention, attends if exchange else None):
                out = self.own(hidden, **kwargs)
        else:
            out = self.own(hidden, **kwargs)
        self.returns_tuple = isinstance(out, (tuple, list))
        return out

    def _blend(self, plan, hidden: torch.Tensor, out):
        """`out` of `run_parts`; rows that are not kept carry what is skipped instead."""
        if self.routing.units_per_layer == 2 or plan.rows[self.place] is None:
            return out
        runs = plan.runs[..., self.place:self.place + 1]
        blended = torch.where(runs, out[0] if self.returns_tuple else out,
                              self.routing.router.skipped(self.place, hidden))
        return (blended, *out[1:]) if self.returns_tuple else blended

    def project(self, cache_layer, hidden: torch.Tensor, positions: dict) -> None:
        """Appends the keys and values of `hidden` `[b, s, d]` to `cache_layer`, nothing else."""
        with torch.no_grad():
            cache = {self.cache_name: _OneLayer(cache_layer), "attention_mask": None}
            self._keys(hidden, positions | cache)

    def _slot(self, cache):
        layers = getattr(cache, "layers", ())
        layer = layers[self.index] if self.index < len(layers) else None
        return layer if isinstance(layer, PendingLayer) else None

    def _wait(self, hidden: torch.Tensor, kwargs: dict) -> bool:
        """Puts off a layer that no row runs. False where its keys and values are needed now."""
        if self.returns_tuple is None or self.function is None or not by_row(kwargs, hidden):
            return False
        cache = kwargs.get(self.cache_name)
        if cache is None:
            return True  # no row, no cache: nobody will read the keys
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
    return [CompactLayer(routing, routing.layers[index], index, width)
            for index in range(routing.first, routing.last)]
