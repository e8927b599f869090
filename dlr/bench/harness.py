"""DLR checkpoints of every kind as a model of lm-evaluation-harness.

    python -m dlr eval CHECKPOINT --tasks blimp --data-dir DIR
    python -m dlr.bench run --model dlr --model_args checkpoint=CHECKPOINT --tasks blimp

Scoring is the harness's own code (HFLM). The class here feeds it batches whose rows it knows, so
that padding and context can be told from scored tokens. A routed request on which the router did
not run is an error. Several processes (torchrun, `accelerate launch`) share the batches.
"""

import contextlib
import hashlib
import itertools
import logging
import sys
from functools import partial
from typing import NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from dlr.base.opened import Opened, load
from dlr.bench.batches import Sizes, split
from dlr.bench.metering import Meter, Watch, end_watch
from dlr.bench.options import OPENING, checked, refuse_absent, typed
from dlr.processes import begin, dealt, gathered, is_first
from dlr.progress import tqdm
from dlr.routing.device import device_of
from dlr.routing.router import ROUTER_NAME
from dlr.routing.weights import causal_lm
from dlr.settings import SettingsError

# HFLM would warn once for each truncated request; the meter counts them
logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)


def key_of(request) -> str:
    """A document's name, which all its requests share in any order or batch."""
    return f"{request.task_name}/{request.doc_id}"


def generated_length(tokens: list[int], eos: set[int], pad: int | None, stop: list[str],
                     decode) -> int:
    """How many of `tokens` (what generate() appended to a row) belong to the row's answer.

    A row ends with its end token, with the token that completes a stop string, or where its padding
    begins. Generation goes on until the last row of the batch has stopped, so what follows a stop
    depends on the batch and is not counted.
    """
    has_stop = bool(stop) and any(word in decode(tokens) for word in stop)
    for place, token in enumerate(tokens):
        if has_stop and any(word in decode(tokens[:place + 1]) for word in stop):
            return place + 1
        if token in eos and token != pad:
            return place + 1
        if token == pad:
            return place if token not in eos else place + 1
    return len(tokens)


class Row(NamedTuple):
    """A row of a batch to score."""
    ids: list[int]         # input tokens after the harness's truncation
    scored: int            # how many of their logits are scored
    document: str


@register_model("dlr")
class DLRLM(HFLM):
    """Args: checkpoint (folder, run, phase or base model) and what `options.OPENING` names (see
    `dlr.load`); or `loaded`, what that returned. batch_size (a number, or 'auto': as many as fit,
    up to max_batch_size, 64), device, max_length and the names in `options.PASSED_ON` as in the
    harness. `meter` holds what all processes measured since `restart_meter`.

    Raises:
        SettingsError: an option that is unknown, or that would have no effect here; the message
            says which and why.
    """

    def __init__(self, checkpoint: str | None = None, *, loaded: Opened | None = None,
                 batch_size: int | str = 16, device: str | None = None,
                 max_batch_size: int | None = None, max_length: int | None = None, **options):
        begin()                                  # each takes a card: 'cuda' is this process's own
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        refuse_absent(device)
        sizes = typed({"batch_size": batch_size, "max_batch_size": max_batch_size,
                       "max_length": max_length})
        self.sizes = Sizes(sizes["batch_size"], sizes["max_batch_size"])
        opening = typed({name: options.pop(name, None) for name in OPENING})
        if opening["dtype"] == "auto":
            opening["dtype"] = None
        options = checked(options, ["checkpoint", "loaded", "batch_size", "max_batch_size",
                                    "device", "max_length", *OPENING])
        given = [name for name, value in (opening | {"checkpoint": checkpoint}).items()
                 if value is not None]
        if loaded is not None and given:
            raise SettingsError(f"{', '.join(given)} would have no effect on a model that is "
                                "loaded already; give either.")
        self.loaded = loaded or load("nano" if checkpoint is None else checkpoint, **opening,
                                     device=None if device == "cpu" else device)
        net = self.loaded.model
        if device_of(net).type not in ("meta", torch.device(device).type):         # meta: offloaded
            net = net.to(device)
        logger = logging.getLogger("lm_eval.models.huggingface")
        # HFLM warns of a model that is given as an object, which is on purpose here
        logger.disabled = True
        # HFLM ties weights, which would undo a head that an adapter trained apart from embeddings
        net.__dict__["tie_weights"] = lambda: None
        try:
            super().__init__(pretrained=net, backend="causal", tokenizer=self.loaded.tokenizer,
                             logits_cache=False, max_length=sizes["max_length"],
                             batch_size=sys.maxsize, **typed(options))   # batches are made here
        finally:
            logger.disabled = False
            del net.__dict__["tie_weights"]
        routing = self.loaded.routing
        if routing is None and hasattr(causal_lm(self.loaded.model), ROUTER_NAME):
            raise ValueError("This model has a router attached, but was given as one without; its "
                             "scores would be routed. Detach the router, or evaluate the 'dense' "
                             "variant.")
        self.watch = Watch(routing, self.loaded.policy) if self.loaded.policy is not None else None
        if routing is not None and self.watch is None:
            end_watch(routing)
            routing.policy = None
        self._keys: list[str] | None = None
        self._key_of_context: dict[str, str] = {}
        self._contexts: list[str] = []
        self._rows: list[Row] | None = None
        self.restart_meter()

    def restart_meter(self) -> Meter:
        """Starts counting from zero; returns the new meter."""
        self.meter = Meter(self.loaded.routing.units if self.loaded.routing is not None else 0)
        return self.meter

    def get_model_info(self) -> dict:
        """What the harness's result files say about the model, with what its tokens ran."""
        meter = self.meter
        return super().get_model_info() | {
            "dlr_variant": self.loaded.kind, "dlr_checkpoint": self.loaded.checkpoint,
            "dlr_digest": self.loaded.digest, "dlr_skip": meter.skip,
            "dlr_context_skip": meter.context_skip, "dlr_scored_tokens": meter.scored,
            "dlr_truncated": meter.truncated, "logits_cache": False}

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()

    @property
    def _first(self) -> int:
        routing = self.loaded.routing
        return routing.config.keep_first_tokens if routing is not None else 0

    # -- batches -----------------------------------------------------------------------------------
    def _dealt(self, batches: list[list[int]], answer, describe: str, quiet: bool) -> list:
        """`answer(batch)`, a list, of all batches, by the numbers of the requests in them.

        All processes' meters are added up.
        """
        before = self.meter
        self.restart_meter()
        hidden = not is_first() or quiet and len(batches) < 20
        bar = partial(tqdm, desc=describe, unit="batch", disable=hidden)
        parts = list(dealt(batches, answer, bar))
        self.meter = sum(gathered(self.meter), before)
        pairs = zip(itertools.chain(*batches), itertools.chain(*parts), strict=True)
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    # -- log-likelihood ----------------------------------------------------------------------------
    def loglikelihood(self, requests, disable_tqdm: bool = False):
        self._keys = [key_of(request) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._keys = None

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False,
                              override_bs: int | None = None):
        """The harness's own batches: sorted by falling length, then by tokens."""
        # `override_bs` is of a harness that makes its batches itself
        keys = self._keys if self._keys is not None else [None] * len(requests)
        texts = [context + continuation for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(texts[i]), texts[i]))
        longest = min(max(map(len, texts), default=1), self.max_length)
        return self._dealt(split(order, self.sizes.of(self, longest)),
                           partial(self._scored, requests, keys), "scoring", disable_tqdm)

    def _scored(self, requests: list, keys: list, batch: list[int]) -> list:
        self._rows = [self._row(requests[i], keys[i]) for i in batch]
        try:
            return super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True,
                                                 override_bs=len(batch))
        finally:
            self._rows = None

    def _row(self, request, key: str | None) -> Row:
        _, context, continuation = request
        text = context + continuation
        if not continuation or len(continuation) > self.max_length:
            raise ValueError(f"A continuation of {len(continuation)} tokens cannot be scored in a "
                             f"context of {self.max_length}; the harness does not cut "
                             "continuations.")
        self.meter.requests += 1
        self.meter.truncated += len(text) > self.max_length + 1
        return Row(text[-(self.max_length + 1):][:-1], len(continuation), key or _digest(text))

    def _model_call(self, inps, attn_mask=None, labels=None):
        rows = self._rows
        width = inps.shape[1]
        if rows is None or [row.ids for row in rows] != [ids[:len(row.ids)]
                                                         for row, ids in zip(rows, inps.tolist())]:
            raise RuntimeError("The harness sent a batch that is not the one it was given; its "
                               "rows cannot be told apart.")
        lengths = torch.tensor([len(row.ids) for row in rows])
        scored_from = lengths - torch.tensor([row.scored for row in rows])
        position = torch.arange(width).expand(len(rows), width)
        real = position < lengths.unsqueeze(1)
        if self.watch is not None:
            self.watch.begin(real.to(inps.device), [row.document for row in rows])
        logits = super()._model_call(inps)
        gates = self.watch.taken(len(rows))[0] if self.watch is not None else None
        self.meter.add(gates, real & (position >= scored_from.unsqueeze(1)), real, position,
                       self._first)
        return logits

    # -- generation --------------------------------------------------------------------------------
    def generate_until(self, requests, disable_tqdm: bool = False):
        for request in requests:
            longest = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if longest >= self.max_length:
                raise ValueError(f"{request.task_name} may generate {longest} tokens; that leaves "
                                 "no room for a prompt in this model's context of "
                                 f"{self.max_length}. Set max_gen_toks lower (--gen_kwargs).")
        self._key_of_context = {request.args[0]: key_of(request) for request in requests}
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -lengths[i],
                                                            requests[i].args[0]))
        batches = []
        for _, alike in itertools.groupby(order, key=lambda i: repr(requests[i].args[1])):
            alike = list(alike)
            width = lengths[alike[0]] + requests[alike[0]].args[1].get("max_gen_toks",
                                                                       self.max_gen_toks)
            batches += split(alike, self.sizes.of(self, min(width, self.max_length)))
        return self._dealt(batches, partial(self._generated, requests), "generating", disable_tqdm)

    def _generated(self, requests: list, batch: list[int]) -> list[str]:
        self.meter.requests += len(batch)
        return super().generate_until([requests[i] for i in batch], disable_tqdm=True)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None,
                         truncation=False):
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        self._contexts = list(strings)
        if left_truncate_len:
            self.meter.truncated += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context, max_length, stop, **options):
        one_pass = contextlib.nullcontext()
        if self.watch is not None:
            self.watch.begin(None, [self._key_of_context.get(text) or _digest(list(text.encode()))
                                    for text in self._contexts])
            # two passes cannot use a cache, and generation needs one
            one_pass = self.loaded.routing.at(strategy="single_pass")
        with one_pass:
            generated = super()._model_generate(context, max_length, stop, **options)
        mask = options["attention_mask"].cpu().bool()
        self._measure_generation(generated, mask, context.shape[1], stop)
        return generated

    def _measure_generation(self, generated, mask, width: int, stop: list[str]) -> None:
        """Scored are the positions whose logits chose a token: the last prompt token, and all
        generated ones but the last.
        """
        eos = self.model.generation_config.eos_token_id
        eos = set(eos if isinstance(eos, list) else [eos])
        lengths = torch.tensor([generated_length(row[width:], eos, self.tokenizer.pad_token_id,
                                                 stop, self.tokenizer.decode)
                                for row in generated.tolist()])
        passes = [None] * (generated.shape[1] - width)
        if self.watch is not None:
            passes = self.watch.taken(len(generated))
        position = mask.long().cumsum(1) - 1
        last = torch.zeros_like(mask)
        last[:, -1] = True
        self.meter.add(passes[0], last, mask, position, self._first)
        for step, gates in enumerate(passes[1:], 1):
            unfinished = (lengths > step).unsqueeze(1)
            self.meter.add(gates, unfinished, unfinished, position[:, -1:] + step, self._first)


def _digest(values: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, values)).encode()).hexdigest()[:16]
