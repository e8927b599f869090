"""What a depth router starts from: skip adapters, a static order, and harm labels, of a base model.

All three are the base's own, whatever is trained on it later, and the static control shares the
first two. Each is made once and kept in the cache folder, under a key of all that it depends on.
Several processes share the search and the labelling, and the first of them writes what is one file.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from dlr.base.corpus import cache_folder
from dlr.base.data import packed
from dlr.base.encoding import RULES
from dlr.base.lines import documents_of
from dlr.measure.labels import HarmLabels, blocks_as_batches, label_batch, stream
from dlr.measure.ridge import fit_skip_adapters
from dlr.measure.static import greedy_order_by_kl
from dlr.processes import agreed, is_first, wait
from dlr.routing.attach import attach
from dlr.routing.handle import Routing
from dlr.routing.weights import identity
from dlr.runs import save_tensors, write_atomically
from dlr.train.settings import RunConfig


@dataclass
class Preparation:
    """Adapters (name to tensor, empty: none), static order `[U]`, labels (None: none asked for)."""
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    order: list[int] | None = None
    labels: HarmLabels | None = None

    def install(self, routing: Routing) -> None:
        """Puts adapters and book into a router."""
        if self.adapters:
            own = routing.router.skip.state_dict()
            with torch.no_grad():
                for name, tensor in self.adapters.items():
                    own[name].copy_(tensor)
        if self.order is not None and hasattr(routing.router, "set_order"):
            routing.router.set_order(self.order)


class Preparer:
    """Makes or reads a base model's preparation.

    Args:
        base: a causal LM without adapters or router.
    """

    def __init__(self, base, tokenizer, config: RunConfig):
        self.base, self.tokenizer, self.config = base, tokenizer, config
        self.documents = documents_of(config, "train")
        numbers = {"dtype": config.dtype, "autocast": config.autocast}
        self.key = [identity(base), self.documents.hash, RULES, numbers, config.seq_len,
                    config.always_keep, config.keep_last, config.keep_first_tokens, config.unit]
        self.key += [config.kv] * (config.kv != "complete")

    def _path(self, kind: str, *more) -> Path:
        key = json.dumps([*self.key, *more], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return cache_folder() / "prepared" / f"{kind}-{digest}"

    def _batches(self, tokens: int, part: int) -> list[dict]:
        """Batches of training text; parts 0, 1, 2 take the documents in other orders.

        More tokens begin with the same ones, so that labels can be added to.
        """
        return batches_of(self.documents, self.tokenizer, self.config, part, tokens)

    def _attached(self) -> Routing:
        """A router of plain paths: what is found is the base's, whatever weighs them later."""
        config = self.config.router()
        if not self.config.reads_book:
            config = config.changed(router_class="Router", level="token")
        return attach(self.base, config, bf16=self.config.autocast)

    def adapters(self) -> dict[str, torch.Tensor]:
        """The closed-form skip adapters; {} where the rank is 0."""
        config = self.config
        if not config.skip_adapter_rank:
            return {}
        path = self._path("adapters", config.skip_adapter_rank, config.adapter_tokens)
        path = path.with_suffix(".safetensors")
        if agreed(not path.is_file()):
            routing = self._attached()
            try:
                fit_skip_adapters(self.base, routing, self._batches(config.adapter_tokens, 0))
                if is_first():
                    save_tensors({name: parameter.detach().cpu() for name, parameter
                                  in routing.router.skip.named_parameters()}, path)
            finally:
                routing.detach()
            wait()
        return load_file(path)

    def order(self) -> list[int]:
        """The greedy static order, found with the adapters, by KL on training text."""
        config = self.config
        adapters = self.adapters()
        path = self._path("order", config.skip_adapter_rank, config.adapter_tokens,
                          config.order_tokens, config.candidates).with_suffix(".json")
        if agreed(not path.is_file()):
            routing = self._attached()
            try:
                Preparation(adapters).install(routing)
                batches = self._batches(config.order_tokens, 1)
                kept = path.with_suffix(".part.json")
                order = greedy_order_by_kl(self.base, routing, batches, config.candidates, kept)
            finally:
                routing.detach()
            if is_first():
                write_atomically(path, json.dumps(order))
                kept.unlink()
            wait()
        return json.loads(path.read_text(encoding="utf-8"))

    def labels(self) -> HarmLabels:
        """Harms of `label_tokens` tokens under every plan; an interrupt loses one batch."""
        config = self.config
        start = Preparation(self.adapters(), self.order())
        routing = self._attached()
        try:
            start.install(routing)
            folder = self._path("labels", config.skip_adapter_rank, config.adapter_tokens,
                                start.order, routing.router.depths.tolist(),
                                config.label_batch)
            return stream(self._batches(config.label_tokens, 2),
                          lambda batch: label_batch(self.base, routing, batch), folder,
                          "labelling harm")
        finally:
            routing.detach()


def prepare(base, tokenizer, config: RunConfig, labels: bool = True) -> Preparation:
    """Adapters and order of a base, and the labels where they are asked for."""
    preparer = Preparer(base, tokenizer, config)
    return Preparation(preparer.adapters(), preparer.order(),
                       preparer.labels() if labels else None)


def context_batches(tokenizer, config: RunConfig) -> list[dict]:
    """Training text to label in context, other for each seed; [] where none is asked for."""
    if not config.context_tokens:
        return []
    return batches_of(documents_of(config, "train"), tokenizer, config,
                      1000 + config.seed, config.context_tokens)


def batches_of(documents, tokenizer, config: RunConfig, seed: int, tokens: int) -> list[dict]:
    """`tokens` tokens or a few more of documents in an order drawn by `seed`.

    A batch holds `label_batch` tokens, or all of them where these are fewer.
    """
    rows = max(1, min(config.label_batch, tokens) // config.seq_len)
    longest = tokens + max(config.label_batch, config.seq_len)
    blocks = packed(documents, tokenizer, config.seq_len, seed, longest).blocks
    return blocks_as_batches(blocks, tokens, rows)
