"""Compact execution: each layer computes only the rows its plan keeps, with the family's own code.

All decisions are known after layer K, so the kept rows of every layer are found at once, with one
host sync. A routable layer then runs twice, neither time in full. *First* up to its attention, with
every row, for keys and values: K/V complete. *Then* with the kept rows as a sequence of their own,
whose attention finds the keys and values of all. Norms, rotary embeddings, soft-capping, windows,
quantised and LoRA-wrapped linears stay the family's own, and see no row too many.

Where attention and MLP keep different rows, or attention is no function that can be exchanged, the
layer runs once, part by part: its query and output projections and its MLP gather the kept rows,
compute them and scatter them.

A layer that no row runs is not called: its keys and values wait (see `pending`). Where nothing is
skipped, or too little to pay for running it twice, the layer is left alone.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dlr.routing.families import names
from dlr.routing.intercept import InPlace, Standin, attention_function, intercepted, own_forwards
from dlr.routing.masked import argument_names
from dlr.routing.owed import PendingLayer, by_row, joined, pending_layer, positional
from dlr.routing.parts import Parts, width_of
from dlr.routing.rows import Rows, attend

# FLOPs of products that take as long as running a layer by rows costs more: 2 ms on two CPU cores,
# as measured; on an accelerator about 0.3 ms of kernel launches at 150 TFLOP/s, an estimate
OVERHEAD = {"cpu": 1.5e8, "cuda": 5e10}


class _OneLayer:
    """A cache of one layer, for a layer that is run for its keys and values only."""

    def __init__(self, layer):
        self.layer = layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layer.update(key_states, value_states)


class _Reached(Exception):
    """Ends a layer's run at its attention; carries what attention was given."""


def _stop(module, query, key, value, attention_mask, **kwargs):
    raise _Reached(query, key, value, attention_mask)


@dataclass(frozen=True)
class _Blank:
    """A projection that computes nothing: zeros `[..., width]`."""
    width: int

    def __call__(self, x, *args, **kwargs):
        return x.new_zeros(*x.shape[:-1], self.width)


def _selective(module: nn.Module, rows: Rows, width: int, extras: dict):
    """`module`'s forward for `rows` alone: gather, compute, scatter. Other rows come out as zeros.

    `extras` notes how many further outputs it has (an MLP of experts returns its router's choices),
    for when no row runs.
    """
    standin = Standin.of(module)                                  # another thread's, or none
    own = module.forward if standin is None else standin.own

    def forward(x, *args, **kwargs):
        lead = x.shape[:-1]
        if not rows.count and module in extras:
            return _joined(x.new_zeros(*lead, width), (None,) * extras[module])
        if not rows.count:
            out = own(x, *args, **kwargs)
        else:
            by_row = [isinstance(a, torch.Tensor) and a.shape[:-1] == lead for a in args]
            args = [rows.gather(a) if each else a for a, each in zip(args, by_row)]
            out = own(rows.gather(x), *args, **kwargs)
        first, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        extras[module] = len(others)
        whole = rows.scatter(first, lead) if rows.count else x.new_zeros(*lead, width)
        return _joined(whole, others)

    return forward


def _joined(first: torch.Tensor, others: tuple):
    return (first, *others) if others else first


class CompactLayer(InPlace):
    """Runs one routable layer by its rows, in the place of its `forward` in compact passes.

    Raises:
        NotCompactable: see `Parts`.
    """

    def __init__(self, routing, layer: nn.Module, index: int, width: int):
        super().__init__(layer)
        self.routing, self.index = routing, index
        self.place, self.width = index - routing.first, width
        self.names = argument_names(layer)[1:]
        self.cache_name = next((name for name in names("cache") if name in self.names),
                               names("cache")[0])
        self.returns_tuple: bool | None = None                    # known once the layer has run
        self._find()

    def _find(self) -> None:
        self.parts = Parts(self.module)
        self.attention = self.parts.attention
        self.children = self._inside()
        # packed 4-bit ones count as fewer
        self.weights = sum(p.numel() for p in self.module.parameters())
        parts, width = self.parts, self.width
        self.no_query = {m: _Blank(parts.blank_query_width(width)) for m in parts.query}
        self.no_keys = {m: _Blank(width_of(m, width)) for m in (*parts.key_value, *parts.fused)}
        self.extra_outputs = dict.fromkeys((*self.parts.query, *self.parts.output), 0)
        self.touched = (self.attention, *self.no_query, *self.no_keys, *self.parts.output,
                        *self.parts.mlp)

    def _inside(self) -> tuple:
        return *self.module._modules.values(), *self.attention._modules.values()

    def tidy(self) -> None:
        """Takes away what an interrupt of this thread may have left on the layer's modules."""
        own_forwards(self.touched, everybody=False)

    def refresh(self) -> None:
        """Finds the parts again where LoRA was added, merged or removed; raises NotCompactable."""
        if self._inside() != self.children:
            self._find()

    def install(self) -> None:
        """Puts this in the place of the layer's forward until `remove`, for a compact pass."""
        # asked once a pass: a model can change it
        self.function = attention_function(self.attention)
        super().install()

    def __call__(self, hidden=None, *args, **kwargs):
        plan = self.routing.current  # None in a thread whose pass is dense
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        kwargs |= dict(zip(self.names, args))
        if plan is None or not plan.compact:
            return self.own(hidden, **kwargs)
        self.routing.planned(plan)
        halves = self.routing.units_per_layer
        rows = plan.rows[self.place * halves:(self.place + 1) * halves]
        nobody = all(each is not None and not each.count for each in rows)
        if nobody and self._wait(hidden, kwargs):
            skipped = self.routing.router.skipped(self.place, hidden) if halves == 1 else hidden
            return self._output(skipped)
        slot = self._slot(kwargs.get(self.cache_name))
        owed = slot is not None and bool(slot.waiting)
        plain = halves == 1 and self._plain(rows[0], hidden.device.type)
        # by rows, in two runs: where one gate decides on the layer, its attention function can be
        # exchanged, its output's form is known or about to be, and either keys are owed, which such
        # a run takes along, or rows are worth it
        formed = self.returns_tuple is not None or rows[0] is None or rows[0].count
        whole = halves == 1 and self.function is not None and formed
        if whole and (owed or not plain) and by_row(kwargs, hidden):
            return self._output(self.run(hidden, kwargs, rows[0], slot.take() if owed else []))
        if owed:
            slot.complete()
        # in one run, part by part; a plain layer computes every row
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
        """What follows the layer `[b, s, d]`, with only the given rows of `hidden` `[b, s, d]`
        computed; None: all.

        `waiting` holds earlier inputs whose keys and values are owed: their projection takes them
        along, in front.
        """
        extra = sum(earlier.shape[1] for earlier, _ in waiting)
        whole, now = hidden, positional(kwargs)
        at = now
        if extra:
            whole = torch.cat([*(earlier for earlier, _ in waiting), hidden], 1)
            at = {name: joined([*(p[name] for _, p in waiting), now[name]]) for name in now}
        query, key, value, mask = self._keys(whole, kwargs | at)
        rows = rows if rows is not None else Rows.every(*hidden.shape[:2], hidden.device)
        skipped = self.routing.router.skipped(self.place, hidden)
        if not rows.count:
            return skipped

        def attention(module, kept, *keys_and_mask, **options):
            kept = rows.chosen(query[:, :, extra:]) if self.parts.fused else rows.by_sequence(kept)
            out = attend(self.function, rows, module, kept, key, value, mask, **options)
            return rows.in_one(out), None

        positions = {name: rows.positions(part) for name, part in now.items()}
        with intercepted(self.no_keys, self.attention, attention):
            nothing = {self.cache_name: None, "attention_mask": None}
            out = self.own(rows.gather(hidden), **kwargs | positions | nothing)
        self.returns_tuple = isinstance(out, (tuple, list))
        return rows.onto(skipped, out[0] if self.returns_tuple else out)

    def _keys(self, hidden: torch.Tensor, kwargs: dict) -> tuple:
        """Runs the layer up to its attention: (query, key, value, mask) as attention gets them; the
        query is good if fused.

        A cache among `kwargs` has then taken the keys and values.
        """
        with intercepted(self.no_query, self.attention, _stop):
            try:
                self.own(hidden, **kwargs)
            except _Reached as reached:
                return reached.args
        raise RuntimeError(f"{type(self.attention).__name__} never called its attention function. "
                           "Use execution='masked'.")

    def run_parts(self, hidden: torch.Tensor, kwargs: dict, attention: Rows | None,
                  mlp: Rows | None):
        """The layer's own output, good in the given rows of each part; None computes all."""
        forwards = {}
        projections = [*self.parts.query, *self.parts.output]
        for rows, modules in ((attention, projections), (mlp, self.parts.mlp)):
            for module in modules if rows is not None else ():
                width = width_of(module, self.width)
                forwards[module] = _selective(module, rows, width, self.extra_outputs)

        def attends(module, query, key, value, mask, **options):
            shape = attention.batch, attention.length
            if not attention.count:
                return query.new_zeros(*shape, query.shape[1], value.shape[-1]), None
            out = attend(self.function, attention, module, attention.chosen(query), key, value,
                         mask, **options)
            whole = attention.scatter(attention.in_one(out).flatten(2), shape)
            return whole.view(*shape, *out.shape[2:]), None

        exchange = self.function is not None and attention is not None
        with intercepted(forwards, self.attention, attends if exchange else None):
            out = self.own(hidden, **kwargs)
        self.returns_tuple = isinstance(out, (tuple, list))
        return out

    def _blend(self, plan, hidden: torch.Tensor, out):
        """The output of a layer run by parts, with what is skipped in rows that are not kept."""
        if self.routing.units_per_layer == 2 or plan.rows[self.place] is None:
            return out
        runs = plan.runs[..., self.place:self.place + 1]
        kept = torch.where(runs, out[0] if self.returns_tuple else out,
                           self.routing.router.skipped(self.place, hidden))
        return (kept, *out[1:]) if self.returns_tuple else kept

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
        """Puts the layer off: no row runs it. False where its keys and values are needed now."""
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
