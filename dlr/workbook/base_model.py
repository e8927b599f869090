"""Notebook 00's work: stages of pretraining, export to dlr/nano, and a report on it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from dlr.base.data import Documents, folder_texts, load_documents, padded_batches, read_wikitext
from dlr.base.encoding import encode, opening_token, padding_token
from dlr.base.models import NANO
from dlr.base.pretrain import (STAGE, new_model, pretrain, pretraining_stream, pretraining_texts,
                               train_tokenizer)
from dlr.measure.evaluate import bootstrap, evaluate, perplexity
from dlr.progress import tqdm
from dlr.routing.attach import attach
from dlr.routing.config import RouterConfig
from dlr.routing.device import fast_bf16
from dlr.routing.policy import StaticPlan
from dlr.runs import from_project, write_atomically
from dlr.settings import SettingsError
from dlr.workbook.phases.base_model import BaseModelConfig

HISTORY = "training.json"          # loss by tokens seen, beside the exported weights
PROMPTS = ("Once upon a time, there was a little", "Return the sum of the array elements over",
           "The village is located in")
CONTEXT = 512                      # tokens of context in the bits-per-byte figures


def train_stage(config: BaseModelConfig) -> pd.DataFrame:
    """Runs the stable or the decay stage in `config.work_dir`; returns the loss history.

    Raises:
        SettingsError: decay without a stable checkpoint to start from.
    """
    work = Path(config.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(config, work)
    stream = pretraining_stream(config.text_dir, tokenizer, work / "stream.npy", config.dataset)
    model = new_model(len(tokenizer), config.layers, config.width, config.seed)
    start = 0
    if config.stage == "decay":
        stable = _newest(work / "stable")
        if stable is None:
            raise SettingsError("stage='decay' needs a checkpoint of the stable stage in "
                                f"{str(work / 'stable')!r}; run stage='stable' first.")
        model = AutoModelForCausalLM.from_pretrained(stable, dtype=torch.float32)
        start = _seen(stable)
    pretrain(model, np.roll(stream, -start) if start else stream, work / config.stage,
             steps=config.steps, seq_len=config.seq_len, batch_size=config.batch_size,
             schedule="linear" if start else "constant_with_warmup", warmup=0 if start else 100,
             seed=config.seed, compile=config.compile, muon_lr=config.muon_lr,
             adamw_lr=config.adamw_lr)
    return _history(work)


def _newest(stage: Path) -> Path | None:
    """The newest checkpoint of a stage, if there is any."""
    folder = get_last_checkpoint(str(stage)) if stage.is_dir() else None
    return Path(folder) if folder else None


def _tokenizer(config: BaseModelConfig, work: Path):
    if not (work / "tokenizer").is_dir():
        texts = pretraining_texts(config.text_dir, config.seed, config.dataset)
        openings = [text[:20_000] for text in texts[:9000]]
        train_tokenizer(openings, config.vocab_size).save_pretrained(work / "tokenizer")
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def _seen(checkpoint: Path) -> int:
    """Tokens a checkpoint has seen in its stage."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    stage = json.loads((checkpoint.parent / STAGE).read_text(encoding="utf-8"))
    return state["global_step"] * stage["tokens_per_step"]


def _history(work: Path) -> pd.DataFrame:
    rows = []
    offset = 0
    for stage in ("stable", "decay"):
        folder = _newest(work / stage)
        if folder is None:
            continue
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        seen = _seen(folder)
        rows += [{"stage": stage, "tokens": offset + entry["step"] * seen // state["global_step"],
                  "loss": float(entry["loss"])}
                 for entry in state["log_history"] if "loss" in entry]
        offset += seen
    return pd.DataFrame(rows)


def export(config: BaseModelConfig) -> pd.DataFrame:
    """Writes the newest checkpoint (of decay, else of stable) to dlr/nano/, with its history."""
    work = Path(config.work_dir)
    newest = _newest(work / "decay") or _newest(work / "stable")
    if newest is None:
        raise SettingsError(f"There is no checkpoint in {str(work)!r} to export.")
    model = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.bfloat16)
    model.config.use_cache = True                             # Trainer turns it off
    model.generation_config.use_cache = True
    model.save_pretrained(NANO)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(NANO)
    history = _history(work)
    write_atomically(NANO / HISTORY, json.dumps(history.to_dict("records"), indent=0) + "\n")
    return history


def training_history() -> pd.DataFrame:
    """The loss history that came with the exported model."""
    path = NANO / HISTORY
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return pd.DataFrame(rows)


def history_of(config: BaseModelConfig) -> pd.DataFrame:
    """Does the work of `config.stage`, if there is any; returns its loss history."""
    if config.stage == "report":
        return training_history()
    return export(config) if config.stage == "export" else train_stage(config)


def _windows(texts: list[str], tokenizer, limit: int) -> list[str]:
    """Texts cut to about CONTEXT tokens each, at most `limit` pieces."""
    pieces = []
    for text in texts:
        ids = encode(tokenizer, text)
        for start in range(0, len(ids), CONTEXT - 1):
            pieces.append(tokenizer.decode(ids[start:start + CONTEXT - 1]))
            if len(pieces) == limit:
                return pieces
    return pieces


def bits_per_byte(model, tokenizer, config: BaseModelConfig) -> list[dict]:
    """Bits per byte, with a 95 % interval over windows of 512 tokens, on each test text there is.

    Every window starts from the end-of-text token. Of each text the first `2 * eval_docs` are used.
    """
    sources = {"embedded corpus, test": load_documents("embedded", "test").texts}
    if config.wikitext_test:
        sources["WikiText-103, test"] = [read_wikitext(from_project(config.wikitext_test))]
    if config.tinystories_validation:
        sources["TinyStories, validation part"] = folder_texts(config.tinystories_validation)
    rows = []
    for label, texts in sources.items():
        pieces = _windows(texts, tokenizer, 2 * config.eval_docs)
        batches = padded_batches(Documents(label, "test", pieces, ""), tokenizer, CONTEXT + 64, 16)
        with _routed(model) as routing:
            table = evaluate(model, routing, batches, None, describe=label)
        table["bytes"] = [len(piece.encode()) for piece in pieces]

        def bits(sums):
            return sums["nll"] / sums["bytes"] / np.log(2)

        columns = table[["nll", "bytes"]]
        low, high = bootstrap(columns, bits)
        rows.append({"text": label, "bits_per_byte": float(bits(columns.sum())),
                     "low": low, "high": high,
                     "perplexity": perplexity(table), "tokens": int(table["predicted"].sum())})
    return rows


@contextlib.contextmanager
def _routed(model):
    """A router for the duration, which the instruments need; then `model` is the base again."""
    config = RouterConfig(always_keep=1, keep_first_tokens=0)
    routing = attach(model, config, bf16=fast_bf16())
    try:
        yield routing
    finally:
        routing.detach()


def layer_harm(model, tokenizer, config: BaseModelConfig) -> list[float]:
    """Nats a token that skipping each layer alone adds on the embedded test split."""
    batches = padded_batches(load_documents("embedded", "test"), tokenizer, 256, 16,
                             limit=min(64, config.eval_docs))
    with _routed(model) as routing:
        dense = evaluate(model, routing, batches, None)

        def harm(table: pd.DataFrame) -> float:
            return float((table["nll"].sum() - dense["nll"].sum()) / dense["predicted"].sum())
        harms = [harm(_without_first(model, routing, batches))]
        for unit in tqdm(range(routing.units), desc="skipping each layer", unit="layer"):
            gates = torch.ones(routing.units)
            gates[unit] = 0.0
            harms.append(harm(evaluate(model, routing, batches, StaticPlan(gates), bar=False)))
    return harms


def _without_first(model, routing, batches) -> pd.DataFrame:
    """Layer 0 is never routable; a hook that returns its input skips it."""
    handle = routing.layers[0].register_forward_hook(lambda module, args, output: args[0])
    try:
        return evaluate(model, routing, batches, None)
    finally:
        handle.remove()


def continuations(model, tokenizer, seed: int, length: int = 60) -> list[str]:
    """Sampled continuations (temperature 0.8, top-p 0.95) of three prompts."""
    torch.manual_seed(seed)
    texts = []
    for prompt in PROMPTS:
        ids = [opening_token(tokenizer), *encode(tokenizer, prompt)]
        batch = torch.tensor([ids], device=model.device)
        out = model.generate(batch, max_new_tokens=length, do_sample=True, temperature=0.8,
                             top_p=0.95, attention_mask=torch.ones_like(batch),
                             pad_token_id=padding_token(tokenizer))
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts
