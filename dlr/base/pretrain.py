"""Pretraining of the embedded base: tokenizer, Muon + AdamW, Trainer, warm-up-stable-decay.

A stable stage (constant rate) can go on for as long as there is time, is checkpointed and resumes
by itself; a decay stage started from any of its checkpoints gives a model to export. Muon: Jordan
et al. 2024; stable-then-decay: Hu et al. 2024 (MiniCPM).
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer,
                          TrainingArguments)
from transformers.trainer_utils import get_last_checkpoint

from dlr.base import encoding
from dlr.base.data import PackedBlocks, folder_texts, load_documents, token_stream
from dlr.routing.device import fast_bf16
from dlr.runs import atomic_file, write_atomically

END, PAD = "<|endoftext|>", "<|pad|>"
STAGE = "stage.json"          # beside the checkpoints: tokens a step


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; digits are split one by one; every byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD,
        model_max_length=1024, clean_up_tokenization_spaces=False)


def pretraining_texts(text_dir: str, seed: int = 0, dataset: str = "") -> list[str]:
    """Documents of `text_dir` (if any) and the embedded corpus, or of `dataset`; shuffled."""
    texts = load_documents(dataset or "embedded", "train").texts
    if text_dir and not dataset:
        texts = texts + folder_texts(text_dir)
    random.Random(seed).shuffle(texts)
    return texts


def pretraining_stream(text_dir: str, tokenizer, cache: Path, dataset: str = "") -> np.ndarray:
    """The training tokens `[n]` (uint32), tokenised once and kept beside `cache` (a .npy file).

    The file's name ends in a hash of texts, tokenizer and the rules of `dlr.base.encoding`: a
    stream of other text, or one in which spelled-out special tokens end documents, is never
    taken for this one.
    """
    texts = pretraining_texts(text_dir, dataset=dataset)
    path = cache.with_name(f"{cache.stem}-{_stream_key(texts, tokenizer)}.npy")
    if not path.exists():
        stream = token_stream(texts, tokenizer)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, stream, allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _stream_key(texts: list[str], tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = getattr(tokenizer, "get_vocab", dict)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(words().items()))
    start = encoding.opening_token(tokenizer)
    digest = hashlib.sha256(f"{encoding.RULES}\0{start}\0{vocabulary}".encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]


def nano_config(vocab_size: int, layers: int = 16, width: int = 192) -> LlamaConfig:
    """Llama with grouped queries (heads of 64, one K/V head), tied embeddings: 7.1 M parameters."""
    return LlamaConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=width * 8 // 3,
                       num_hidden_layers=layers, num_attention_heads=width // 64,
                       num_key_value_heads=1, max_position_embeddings=1024,
                       tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
                       pad_token_id=1)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the layers' matrices, AdamW for embeddings and norms, as one optimizer."""

    def __init__(self, model, muon_lr: float, adamw_lr: float):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if matrix else others).append(parameter)
        self.parts = [torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.1,
                                       adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)]
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        parts = [part.state_dict() for part in self.parts]
        return {"parts": parts, "param_groups": [], "state": {}}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def pretrain(model, stream: np.ndarray, folder: Path, *, steps: int, seq_len: int, batch_size: int,
             muon_lr: float, adamw_lr: float, schedule: str, accumulation: int = 1,
             warmup: int = 100, seed: int = 0, save_steps: int = 200,
             compile: bool = False) -> Trainer:
    """Trains `model` in place for `steps` steps; goes on from the newest checkpoint there.

    `schedule` is 'constant_with_warmup' (stable stage) or 'linear' (decay stage).
    """
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, lr_scheduler_type=schedule, warmup_steps=warmup,
        max_grad_norm=1.0, bf16=fast_bf16(), torch_compile=compile, logging_steps=20,
        save_steps=save_steps, save_total_limit=2, seed=seed, report_to=[],
        dataloader_num_workers=0, use_cpu=not torch.cuda.is_available(), disable_tqdm=None)
    data = PackedBlocks(stream, seq_len, seed)

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    stage = {"tokens_per_step": batch_size * accumulation * seq_len}
    write_atomically(folder / STAGE, json.dumps(stage))
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate,
                      optimizers=(MuonAdamW(model, muon_lr, adamw_lr), None))
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    return trainer


def new_model(vocab_size: int, layers: int, width: int, seed: int = 0) -> LlamaForCausalLM:
    """A fresh model in float32, initialised from `seed`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(nano_config(vocab_size, layers, width))
