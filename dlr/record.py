"""Token records: everything a view or a statistic needs to know about some text under one routed model.

Made once from a model, saved as safetensors + JSON, read back without one. Figures, tables and the explorer are
functions of a record.

Notation: n tokens of all texts, one after the other; U routable units; k top predictions.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from dlr.data import opening_token
from dlr.evaluate import autocast, device_of
from dlr.policy import Policy, RouterPolicy
from dlr.progress import tqdm
from dlr.routed import Routing, describe_base
from dlr.runs import save_tensors, write_atomically

TENSORS = ("ids", "document", "position", "gates", "logits", "loss_dense", "loss_routed", "entropy_dense", "kl",
           "top_dense", "top_routed", "top_dense_probability", "top_routed_probability")
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Record:
    """Tokens, plan and losses of some texts under one model.

    A position's losses, entropy and KL belong to the prediction made there, that is of the *next* token: it is that
    prediction which the position's own depth pays for. They are NaN at the last token of each text.

    Attributes:
        ids: `[n]` token ids; document `[n]`: index of the text; position `[n]`: place in the text, from 0.
        gates: `[n, U]` bool, True = run. logits: `[n, U]` router logits, NaN where no router made the plan.
        loss_dense, loss_routed: `[n]` nats, under the base model and under the routed one.
        entropy_dense: `[n]` nats, of the dense prediction. kl: `[n]` nats, KL(dense || routed).
        top_dense, top_routed: `[n, k]` ids of the likeliest next tokens; `..._probability` `[n, k]`.
        tokens: `[n]` decoded pieces. meta: always_keep, keep_last, keep_first_tokens, units_per_layer, layers,
            threshold, model, policy, top_tokens (id to text).
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

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def active_layers(self) -> torch.Tensor:
        """Layers each token ran `[n]` (halves where attention and MLP are gated apart)."""
        always = self.meta["always_keep"] + self.meta["keep_last"]
        return always + self.gates.sum(1) / self.meta["units_per_layer"]

    @property
    def skip_ratio(self) -> float:
        """1 - mean gate over tokens and routable units."""
        return 1.0 - self.gates.float().mean().item()

    def perplexity(self, which: str = "routed") -> float:
        """exp of the mean loss a predicted token, `which` of 'dense' and 'routed'."""
        return float(torch.exp(torch.nanmean(getattr(self, f"loss_{which}").double())))

    def at_threshold(self, threshold: float) -> "Record":
        """The plan at another threshold, from the logits alone; routed losses and predictions are unknown (NaN, -1)."""
        gates = (self.logits > threshold) | (self.position < self.meta["keep_first_tokens"]).unsqueeze(1)
        unknown = torch.full_like(self.loss_routed, NAN)
        return replace(self, gates=gates, loss_routed=unknown, kl=unknown, top_routed=torch.full_like(self.top_routed, -1),
                       top_routed_probability=torch.full_like(self.top_routed_probability, NAN),
                       meta=self.meta | {"threshold": threshold})

    def save(self, path: str | Path) -> Path:
        """Writes `path`.safetensors and `path`.json, each whole or not at all; returns the JSON's path."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors["gates"] = tensors["gates"].to(torch.uint8)
        save_tensors(tensors, path.with_suffix(".safetensors"))
        return write_atomically(path.with_suffix(".json"),
                                json.dumps({"meta": self.meta, "tokens": self.tokens}, ensure_ascii=False) + "\n")

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
            raise FileNotFoundError(f"There is no token record at {str(path)!r}: {missing[0].name} is missing. "
                                    "record(...).save(path) writes both files.")
        tensors, text = load_file(files[0]), json.loads(files[1].read_text(encoding="utf-8"))
        tensors["gates"] = tensors["gates"].bool()
        return cls(**tensors, tokens=text["tokens"], meta=text["meta"])


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds; a byte-level piece that is no whole character shows as U+FFFD.

    SentencePiece decoders drop the space that opens a word where a text begins, so here at every token: it is put back.
    """
    texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    opens = [str(name).startswith("\N{LOWER ONE EIGHTH BLOCK}") for name in tokenizer.convert_ids_to_tokens(list(ids))]
    return [f" {text}" if space and not text.startswith(" ") else text for text, space in zip(texts, opens)]


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[s, V]` (float32) and the next token's loss `[s]`, NaN at the end."""
    log_p = logits.float().log_softmax(-1)
    loss = torch.full(ids.shape, NAN)
    loss[:-1] = -log_p[:-1].gather(1, ids[1:, None]).squeeze(1).cpu()
    return log_p, loss


@torch.no_grad()
def _record_text(model, routing: Routing, ids: torch.Tensor, policy: Policy, top: int, bf16: bool) -> dict:
    """Tensors of one text, ids `[s]`."""
    from dlr.objective import frozen_base
    batch = ids.unsqueeze(0)
    with autocast(ids.device, bf16), frozen_base(model, routing):
        dense, loss_dense = _losses(model(input_ids=batch, use_cache=False).logits[0], ids)
    with autocast(ids.device, bf16), routing.using(policy):
        routed, loss_routed = _losses(model(input_ids=batch, use_cache=False).logits[0], ids)
    plan = routing.plan
    kl = (dense.exp() * (dense - routed)).sum(-1).cpu()
    entropy = -(dense.exp() * dense).sum(-1).cpu()
    kl[-1] = entropy[-1] = NAN
    best = {"dense": dense.topk(top, -1), "routed": routed.topk(top, -1)}
    logits = torch.full(plan.gates.shape[1:], NAN) if plan.logits is None else plan.logits[0].float().cpu()
    return {"ids": ids.cpu(), "position": torch.arange(len(ids)), "gates": (plan.gates[0] > 0.5).cpu(), "logits": logits,
            "loss_dense": loss_dense, "loss_routed": loss_routed, "entropy_dense": entropy, "kl": kl,
            **{f"top_{k}": v.indices.cpu() for k, v in best.items()},
            **{f"top_{k}_probability": v.values.exp().cpu() for k, v in best.items()}}


def record(model, routing: Routing, tokenizer, texts: list[str], *, max_len: int = 1024, policy: Policy | None = None,
           top: int = 5, bf16: bool = False, name: str = "", bar: bool = True) -> Record:
    """Runs `texts` through the frozen base and the routed model, one at a time, and records every token.

    Args:
        max_len: tokens a text is cut to, the opening token included.
        policy: the plan's source; the router itself by default.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("There is no text to record; give at least one string.")
    policy, device, parts = policy or RouterPolicy(), device_of(model), []
    for index, text in enumerate(tqdm(texts, desc="recording", unit="text", disable=not bar or len(texts) < 8)):
        ids = [opening_token(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]][:max_len]
        part = _record_text(model, routing, torch.tensor(ids, device=device), policy, top, bf16)
        parts.append(part | {"document": torch.full((len(ids),), index)})
    tensors = {key: torch.cat([part[key] for part in parts]) for key in TENSORS}
    config = routing.config
    forced = config.keep_first_tokens if config.level == "token" else max(config.keep_first_tokens, config.pool_tokens)
    likely = torch.cat([tensors["top_dense"], tensors["top_routed"]]).unique().tolist()
    meta = {"model": name or describe_base(model)["name"], "policy": type(policy).__name__, "layers": len(routing.layers),
            "always_keep": config.always_keep, "keep_last": config.keep_last, "threshold": config.threshold,
            "keep_first_tokens": forced, "units_per_layer": routing.units_per_layer,
            "text_hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
            "top_tokens": dict(zip(map(str, likely), pieces(tokenizer, likely)))}
    return Record(**tensors, tokens=pieces(tokenizer, tensors["ids"].tolist()), meta=meta)
