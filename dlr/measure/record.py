"""Token records: all that views and statistics know of some text under one routed model.

Made once from a model, saved as safetensors + JSON, read back without one. Figures, tables and the
explorer are functions of a record.

Notation: n tokens of all texts, one after the other; U routable units; k top predictions.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from dlr.base.encoding import encode, opening_token
from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import chunks, logits_of
from dlr.progress import tqdm
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.plan import active_layers, skip_ratio
from dlr.routing.policy import Policy, RouterPolicy
from dlr.routing.weights import causal_lm, describe_base
from dlr.runs import save_tensors, write_atomically

TENSORS = ("ids", "document", "position", "gates", "logits", "loss_dense", "loss_routed",
           "entropy_dense", "kl", "top_dense", "top_routed", "top_dense_probability",
           "top_routed_probability")
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Record:
    """Tokens, plan and losses of some texts under one model.

    A position's losses, entropy and KL belong to the prediction made there, that is of the *next*
    token: it is that prediction which the position's own depth pays for. They are NaN at the last
    token of each text.

    Attributes:
        ids: `[n]` token ids.
        document, position: `[n]` index of the text, and place in it from 0.
        gates: `[n, U]` bool, True = run.
        logits: `[n, U]` router logits, NaN where no router made the plan.
        loss_dense, loss_routed: `[n]` nats, under the base model and under the routed one.
        entropy_dense, kl: `[n]` nats, of the dense prediction, and KL(dense || routed).
        top_dense, top_routed: `[n, k]` likeliest next ids, and `..._probability` `[n, k]`.
        tokens: `[n]` decoded pieces.
        meta: always_keep, keep_last, keep_first_tokens, units_per_layer, layers, threshold, model,
            policy, top_tokens (id to text), depths (`[M]` units that each plan of a book drops).
        harm: `[n, M]` nats that a depth router predicts for each plan; None of other routers.
    """
    ids: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    gates: torch.Tensor
    logits: torch.Tensor
    loss_dense: torch.Tensor
    loss_routed: torch.Tensor
    entropy_dense: torch.Tensor
    kl: torch.Tensor
    top_dense: torch.Tensor
    top_routed: torch.Tensor
    top_dense_probability: torch.Tensor
    top_routed_probability: torch.Tensor
    tokens: list[str]
    meta: dict
    harm: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def active_layers(self) -> torch.Tensor:
        """Layers each token ran `[n]`."""
        return active_layers(self.gates, self.meta["always_keep"] + self.meta["keep_last"],
                             self.meta["units_per_layer"])

    @property
    def skip_ratio(self) -> float:
        """1 - mean gate over tokens and routable units."""
        return skip_ratio(self.gates)

    def perplexity(self, which: str = "routed") -> float:
        """exp of the mean loss a predicted token, `which` of 'dense' and 'routed'."""
        return float(torch.exp(torch.nanmean(getattr(self, f"loss_{which}").double())))

    def at_threshold(self, threshold: float) -> "Record":
        """The plan at another threshold, from the logits; routed losses are unknown (NaN, -1).

        Raises:
            ValueError: the router decided layer by layer, so its logits depend on the threshold.
        """
        if not self.meta.get("replannable", True):
            raise ValueError("This record's router decides on each layer from the state before it: "
                             "its plan at another threshold cannot be read off its logits. Record "
                             "the text anew.")
        forced = self.position < self.meta["keep_first_tokens"]
        gates = (self.logits > threshold) | forced.unsqueeze(1)
        unknown = torch.full_like(self.loss_routed, NAN)
        return replace(self, gates=gates, loss_routed=unknown, kl=unknown.clone(),
                       top_routed=torch.full_like(self.top_routed, -1),
                       top_routed_probability=torch.full_like(self.top_routed_probability, NAN),
                       meta=self.meta | {"threshold": threshold})

    def save(self, path: str | Path) -> Path:
        """Writes `path`.safetensors and `path`.json, each whole or not at all; returns the latter.

        A threshold of minus infinity, which closes no gate, becomes null in the standard JSON.
        """
        path = Path(path)
        meta = dict(self.meta)
        if meta.get("threshold") == -math.inf:
            meta["threshold"] = None
        tensors = {name: getattr(self, name) for name in TENSORS}
        if self.harm is not None:
            tensors["harm"] = self.harm
        save_tensors(tensors | {"gates": self.gates.to(torch.uint8)},
                     path.with_suffix(".safetensors"))
        return write_atomically(path.with_suffix(".json"),
                                json.dumps({"meta": meta, "tokens": self.tokens},
                                           ensure_ascii=False, allow_nan=False)
                                + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """The record saved at `path` (with or without a suffix).

        Raises:
            FileNotFoundError: one of the two files is missing.
        """
        path = Path(path)
        files = [path.with_suffix(suffix) for suffix in (".safetensors", ".json")]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"There is no token record at {str(path)!r}: {missing[0].name} "
                                    "is missing. record(...).save(path) writes both files.")
        tensors = load_file(files[0])
        tensors["gates"] = tensors["gates"].bool()
        stored = json.loads(files[1].read_text(encoding="utf-8"))
        meta = stored["meta"]
        if "threshold" in meta and meta["threshold"] is None:
            meta["threshold"] = -math.inf
        return cls(**tensors, tokens=stored["tokens"], meta=meta)


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds; a byte-level piece that is no whole character shows as U+FFFD.

    SentencePiece decoders drop the space that opens a word where a text begins, so here at every
    token: it is put back.
    """
    texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    opens = [str(name).startswith("\N{LOWER ONE EIGHTH BLOCK}")
             for name in tokenizer.convert_ids_to_tokens(list(ids))]
    return [f" {text}" if space and not text.startswith(" ") else text
            for text, space in zip(texts, opens)]


def _log_p(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32, in place of the logits where those are float32 already."""
    log = logits.float()
    return log.sub_(log.logsumexp(-1, keepdim=True))


def _compared(log_p: torch.Tensor, log_q: torch.Tensor, following: torch.Tensor, top: int) -> dict:
    """What a record holds of rows' log-probabilities `[rows, V]`; `log_q` is overwritten.

    `following` `[rows]` are the tokens after them.
    """
    kept = {}
    for name, log in (("dense", log_p), ("routed", log_q)):
        best = log.topk(min(top, log.shape[-1]), -1)
        kept[f"loss_{name}"] = -log.gather(1, following.to(log.device)[:, None]).squeeze(1)
        kept[f"top_{name}"] = best.indices
        kept[f"top_{name}_probability"] = best.values.exp()
    p = log_p.exp()
    kept["entropy_dense"] = -torch.linalg.vecdot(p, log_p)
    kept["kl"] = -log_q.sub_(log_p).mul_(p).sum(-1)
    return {name: value.cpu() for name, value in kept.items()}


def _dense_rows(model, routing: Routing, ids: torch.Tensor, known: dict | None) -> Callable:
    """The base model's logits of a text by rows; `known`, where given, keeps them."""
    key = tuple(ids.tolist())
    if known is not None and key in known:
        return known[key]
    with routing.autocast(), frozen_base(model, routing):
        rows_of = logits_of(model, routing, ids.unsqueeze(0))
    if known is None:
        return rows_of
    known.clear()                                        # one text at a time
    kept = known[key] = lambda rows: rows_of(rows).clone()      # _log_p works in place
    return kept


@torch.no_grad()
def _record_text(model, routing: Routing, ids: torch.Tensor, policy: Policy, top: int,
                 dense: dict | None) -> dict:
    """Tensors of one text, ids `[s]`. Of both models' logits only a few rows are held at a time."""
    dense_rows = _dense_rows(model, routing, ids, dense)
    with routing.autocast(), routing.using(policy):
        routed_rows = logits_of(model, routing, ids.unsqueeze(0))
    plan = routing.plan
    following = ids.roll(-1)
    parts = []
    for rows in chunks(model, len(ids)):
        with routing.autocast(), frozen_base(model, routing):
            log_p = _log_p(dense_rows(rows)[0])
        with routing.autocast():
            log_q = _log_p(routed_rows(rows)[0])
        parts.append(_compared(log_p, log_q, following[rows], top))
    measured = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name in ("loss_dense", "loss_routed", "entropy_dense", "kl"):
        # nothing follows the last token
        measured[name][-1] = NAN
    logits = torch.full(plan.gates.shape[1:], NAN)
    if plan.logits is not None:
        logits = plan.logits[0].float().cpu()
    if plan.harm is not None:
        measured["harm"] = plan.harm[0].float().cpu()
    return measured | {"ids": ids.cpu(), "position": torch.arange(len(ids)),
                       "gates": (plan.gates[0] > 0.5).cpu(), "logits": logits}


def document_ids(tokenizer, text: str, model) -> list[int]:
    """Ids of `text` as a document of `model`, its opening token first.

    Raises:
        ValueError: the tokenizer has no opening token, or has ids that the model does not know.
    """
    ids = [opening_token(tokenizer), *encode(tokenizer, text)]
    known = causal_lm(model).get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise ValueError(f"The tokenizer gives token id {max(ids):,}, but the model knows "
                         f"{known:,} tokens only; use the tokenizer that belongs to this model.")
    return ids


def record(model, routing: Routing, tokenizer, texts: list[str], *, max_len: int = 1024,
           policy: Policy | None = None, top: int = 5, name: str = "", bar: bool = True) -> Record:
    """Runs `texts` through the frozen base and the routed model, and records every token.

    Args:
        max_len: tokens a text is cut to, the opening token included.
        policy: the plan's source; the router itself by default.

    Memory does not grow with text times vocabulary: see `dlr.measure.logits`.

    Raises:
        ValueError: there is no text, the tokenizer has no opening token, or it is not this model's.
    """
    if not texts:
        raise ValueError("There is no text to record; give at least one string.")
    documents = [document_ids(tokenizer, text, model)[:max_len] for text in texts]
    return record_ids(model, routing, tokenizer, documents, text_hash=hash_of(texts),
                      policy=policy, top=top, name=name, bar=bar)


def hash_of(texts: list[str]) -> str:
    """Sixteen hex digits that change with the texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def record_ids(model, routing: Routing, tokenizer, documents: list[list[int]], *, text_hash: str,
               policy: Policy | None = None, top: int = 5, name: str = "", bar: bool = True,
               dense: dict | None = None) -> Record:
    """As `record`, of texts that are token ids already.

    Args:
        dense: keeps the base model's pass over the newest text from one call to the next, so that
            another plan of the same text costs the routed pass alone.
    """
    policy = policy or RouterPolicy()
    device = device_of(model)
    parts = []
    for index, ids in enumerate(tqdm(documents, desc="recording", unit="text",
                                     disable=not bar or len(documents) < 8)):
        part = _record_text(model, routing, torch.tensor(ids, device=device), policy, top, dense)
        parts.append(part | {"document": torch.full((len(ids),), index)})
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    config = routing.config
    likely = torch.cat([tensors["top_dense"], tensors["top_routed"]]).unique().tolist()
    meta = {"model": name or describe_base(model)["name"], "policy": type(policy).__name__,
            "layers": len(routing.layers), "always_keep": config.always_keep,
            "keep_last": config.keep_last, "threshold": routing.threshold,
            "keep_first_tokens": config.forced_tokens, "units_per_layer": routing.units_per_layer,
            "text_hash": text_hash,
            "top_tokens": dict(zip(map(str, likely), pieces(tokenizer, likely)))}
    if not routing.router.ahead:
        meta["replannable"] = False
    if "harm" in tensors:
        meta["depths"] = [int(depth) for depth in routing.router.depths.tolist()]
    return Record(**tensors, tokens=pieces(tokenizer, tensors["ids"].tolist()), meta=meta)
