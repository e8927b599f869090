"""Notebook 00's work: stages of pretraining, export to dlr/nano, and the report on what was exported."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from dlr.phase_base_model import BaseModelConfig
from dlr.settings import SettingsError
from dlr.router_config import RouterConfig
from dlr.data import Documents, folder_texts, load_documents, padded_batches, read_wikitext
from dlr.encoding import encode, opening_token, padding_token
from dlr.evaluate import bootstrap, evaluate, perplexity
from dlr.models import NANO, load_base
from dlr.policy import StaticPlan
from dlr.pretrain import STAGE, new_model, pretrain, pretraining_stream, pretraining_texts, train_tokenizer
from dlr.progress import tqdm
from dlr.routed import attach
from dlr.runs import from_project, write_atomically

HISTORY = "training.json"          # loss by tokens seen, beside the exported weights
PROMPTS = ("Once upon a time, there was a little", "Return the sum of the array elements over", "The village is located in")
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
    rate = {"muon_lr": config.muon_lr, "adamw_lr": config.adamw_lr}
    model = new_model(len(tokenizer), config.layers, config.width, config.seed)
    start = 0
    if config.stage == "decay":
        stable = get_last_checkpoint(str(work / "stable")) if (work / "stable").is_dir() else None
        if not stable:
            raise SettingsError(f"stage='decay' needs a checkpoint of the stable stage in {str(work / 'stable')!r}; run "
                                "stage='stable' first.")
        model = AutoModelForCausalLM.from_pretrained(stable, dtype=torch.float32)
        start = _seen(Path(stable))
    pretrain(model, np.roll(stream, -start) if start else stream, work / config.stage, steps=config.steps,
             seq_len=config.seq_len, batch_size=config.batch_size, schedule="linear" if start else "constant_with_warmup",
             warmup=0 if start else 100, seed=config.seed, compile=config.compile, **rate)
    return _history(work)


def _tokenizer(config: BaseModelConfig, work: Path):
    if not (work / "tokenizer").is_dir():
        texts = pretraining_texts(config.text_dir, config.seed, config.dataset)
        train_tokenizer([text[:20_000] for text in texts[:9000]], config.vocab_size).save_pretrained(work / "tokenizer")
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def _seen(checkpoint: Path) -> int:
    """Tokens a checkpoint has seen in its stage."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    stage = json.loads((checkpoint.parent / STAGE).read_text(encoding="utf-8"))
    return state["global_step"] * stage["tokens_per_step"]


def _history(work: Path) -> pd.DataFrame:
    rows, offset = [], 0
    for stage in ("stable", "decay"):
        folder = get_last_checkpoint(str(work / stage)) if (work / stage).is_dir() else None
        if not folder:
            continue
        state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
        seen = _seen(Path(folder))
        rows += [{"stage": stage, "tokens": offset + entry["step"] * seen // state["global_step"],
                  "loss": float(entry["loss"])} for entry in state["log_history"] if "loss" in entry]
        offset += seen
    return pd.DataFrame(rows)


def export(config: BaseModelConfig) -> pd.DataFrame:
    """Writes the newest decay (else stable) checkpoint to dlr/nano/ in bfloat16, with its loss history."""
    work = Path(config.work_dir)
    folders = [get_last_checkpoint(str(work / s)) for s in ("decay", "stable") if (work / s).is_dir()]
    newest = next((f for f in folders if f), None)
    if newest is None:
        raise SettingsError(f"There is no checkpoint in {str(work)!r} to export.")
    model = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.bfloat16)
    model.config.use_cache = model.generation_config.use_cache = True          # Trainer turns it off
    model.save_pretrained(NANO)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(NANO)
    history = _history(work)
    write_atomically(NANO / HISTORY, json.dumps(history.to_dict("records"), indent=0) + "\n")
    return history


def training_history() -> pd.DataFrame:
    """The loss history that came with the exported model."""
    path = NANO / HISTORY
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else pd.DataFrame()


def history_of(config: BaseModelConfig) -> pd.DataFrame:
    """Does the work of `config.stage`, if there is any, and returns the loss history that goes with it."""
    return train_stage(config) if config.stage in ("stable", "decay") else \
        export(config) if config.stage == "export" else training_history()


def load_for_report(config: BaseModelConfig):
    """The exported model and its tokenizer."""
    return load_base()


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
    """Bits per byte, with a 95 % interval over windows of 512 tokens, on each test text that is to be had.

    Every window starts from the end-of-text token; the first `2 * eval_docs` windows of each text are used.
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

        def bits(frame):
            return float(frame["nll"].sum() / frame["bytes"].sum() / np.log(2))

        low, high = bootstrap(table[["nll", "bytes"]], bits)
        rows.append({"text": label, "bits_per_byte": bits(table), "low": low, "high": high,
                     "perplexity": perplexity(table),
                     "tokens": int(table["predicted"].sum())})
    return rows


@contextlib.contextmanager
def _routed(model):
    """A router for the duration, which the instruments of this project need; `model` is the base again afterwards."""
    routing = attach(model, RouterConfig(always_keep=1, keep_first_tokens=0))
    try:
        yield routing
    finally:
        routing.detach()


def layer_harm(model, tokenizer, config: BaseModelConfig) -> list[float]:
    """Nats a token added on the embedded test split by skipping each layer alone; layer 0 is measured too."""
    batches = padded_batches(load_documents("embedded", "test"), tokenizer, 256, 16, limit=min(64, config.eval_docs))
    with _routed(model) as routing:
        dense = evaluate(model, routing, batches, None)
        tokens = dense["predicted"].sum()
        harms = [_without_first(model, routing, batches, dense, tokens)]
        for unit in tqdm(range(routing.units), desc="skipping each layer", unit="layer"):
            gates = torch.ones(routing.units)
            gates[unit] = 0.0
            table = evaluate(model, routing, batches, StaticPlan(gates), bar=False)
            harms.append(float((table["nll"].sum() - dense["nll"].sum()) / tokens))
    return harms


def _without_first(model, routing, batches, dense, tokens) -> float:
    """Layer 0 is never routable; a hook that returns its input skips it."""
    handle = routing.layers[0].register_forward_hook(lambda module, args, output: args[0])
    try:
        return float((evaluate(model, routing, batches, None)["nll"].sum() - dense["nll"].sum()) / tokens)
    finally:
        handle.remove()


def continuations(model, tokenizer, seed: int, length: int = 60) -> list[str]:
    """Sampled continuations (temperature 0.8, top-p 0.95) of three prompts."""
    torch.manual_seed(seed)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([[opening_token(tokenizer), *encode(tokenizer, prompt)]], device=model.device)
        out = model.generate(ids, max_new_tokens=length, do_sample=True, temperature=0.8, top_p=0.95,
                             attention_mask=torch.ones_like(ids), pad_token_id=padding_token(tokenizer))
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts
