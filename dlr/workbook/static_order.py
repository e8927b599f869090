"""The order in which a static plan drops a model's layers: searched once, then cached."""

import hashlib
import json

import torch

from dlr.base.corpus import cache_folder
from dlr.measure.static import greedy_static_order
from dlr.routing.attach import attach
from dlr.routing.weights import identity
from dlr.runs import write_atomically
from dlr.train.settings import RunConfig


def best_static_order(base, calibration: list[dict], config: RunConfig) -> list[int]:
    """Units in the order in which a static plan drops them, searched on calibration documents.

    The order is kept in the cache folder under a key of all that it depends on: the base's weights
    and the numbers they are computed in, which layers may be dropped and how, and the tokens read.
    """
    batches = spread_documents(calibration, config.static_docs)
    shape = config.router().model_dump()
    numbers = {"dtype": config.dtype, "load_in_4bit": config.load_in_4bit,
               "autocast": config.autocast}
    key = json.dumps([identity(base), shape, numbers, _digest(batches)], sort_keys=True)
    path = cache_folder() / f"static-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    routing = attach(base, config.router(), bf16=config.autocast)
    try:
        order = greedy_static_order(base, routing, batches)
    finally:
        routing.detach()
    write_atomically(path, json.dumps(order))
    return order


def _digest(batches: list[dict]) -> str:
    """Of the documents in `batches`, whatever batches they came in."""
    documents = [ids[real.bool()].tolist() for batch in batches
                 for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


def spread_documents(batches: list[dict], count: int) -> list[dict]:
    """The batches cut down to `count` documents, spread evenly over their lengths."""
    rows = torch.linspace(0, sum(len(b["row"]) for b in batches) - 1, count).round().long().unique()
    chosen, start = [], 0
    for batch in batches:
        inside = rows[(rows >= start) & (rows < start + len(batch["row"]))] - start
        if len(inside):
            chosen.append({name: tensor[inside] for name, tensor in batch.items()})
        start += len(batch["row"])
    return chosen
