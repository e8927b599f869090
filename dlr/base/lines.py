"""Lines of a text in place of documents, for protocols that train on the first long ones.

The lines of the training text are joined by blank lines, tokenised once, and cut into blocks, of
which the last ones are held out. A model is measured on single lines of the validation text. A text
begins as the tokenizer begins it: with a beginning-of-text token where it adds one by itself.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dlr.base.data import (Documents, content_of, hub_lines, load_documents, read_text,
                           read_wikitext)
from dlr.base.encoding import encode
from dlr.runs import from_project

LONG = 100                  # characters; longer lines count
# the text that each split of a run's data is taken from
_TEXTS = {"train": "train", "calibration": "train", "test": "validation"}


@dataclass(frozen=True)
class Lines(Documents):
    """Long lines of one text: the joined ones of the training text, or single ones.

    Attributes:
        block: tokens a block of the joined lines.
        held_out: blocks at its end that are no training text; the split 'calibration'.
    """
    block: int = 128
    held_out: int = 0

    def _blocks(self, tokenizer) -> np.ndarray:
        """Blocks `[n, block]` of the joined lines. A last one that is partial or just full is none.

        Raises:
            ValueError: no block is left beside those that are held out.
        """
        ids = np.array(_begun(tokenizer, "\n\n".join(self.texts)), dtype=np.uint32)
        count = max(0, len(ids) - 1) // self.block
        if count <= self.held_out:
            raise ValueError(f"{len(self.texts)} lines of {self.source!r} give {count} blocks of "
                             f"{self.block} tokens, and {self.held_out} are held out. Give more "
                             "lines, or lower calibration_docs.")
        return ids[:count * self.block].reshape(count, self.block)

    def stream(self, tokenizer, seed, max_tokens=None):
        blocks = self._blocks(tokenizer)
        blocks = blocks[:len(blocks) - self.held_out]
        return blocks[np.random.default_rng(seed).permutation(len(blocks))].ravel()[:max_tokens]

    def rows(self, tokenizer, max_len, limit=None):
        if self.split == "calibration":
            blocks = self._blocks(tokenizer)[-self.held_out:]
            return blocks[:limit, :max_len].tolist()
        return [_begun(tokenizer, text)[:max_len] for text in self.texts[:limit]]


def _begun(tokenizer, text: str) -> list[int]:
    """Ids of `text`, after the token that the tokenizer itself begins a text with, if any."""
    return [*tokenizer("")["input_ids"][:1], *encode(tokenizer, text)]


def _local_lines(folder: Path, text: str) -> list[str]:
    """The lines of the one file of `folder` that is named after `text`, 'train' or 'validation'.

    A .jsonl file holds a line of text as a JSON string a line. Any other is read as WikiText is.

    Raises:
        FileNotFoundError: there is none, or more than one.
        ValueError: a line of a .jsonl file is no JSON string.
    """
    files = [file for file in sorted(folder.glob(f"{text[:5]}*")) if file.is_file()]
    if len(files) != 1:
        raise FileNotFoundError(f"{str(folder)!r} holds {len(files)} files named {text[:5]}*, and "
                                "lines are read of one. Give a folder with one train* and one "
                                "valid* file, or a Hub dataset.")
    if files[0].suffix != ".jsonl":
        return list(io.StringIO(read_wikitext(files[0])))
    try:
        lines = [json.loads(line) for line in read_text(files[0]).split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(files[0])!r} is not valid JSON: {error}") from None
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{str(files[0])!r} must hold one JSON string a line.")
    return lines


@lru_cache(maxsize=8)
def load_lines(dataset: str, split: str, count: int, block: int = 128, held_out: int = 0) -> Lines:
    """The first `count` long lines of a Hub dataset, or of a local folder (see `_local_lines`).

    Args:
        split: 'train', 'calibration' (the blocks of the same lines that are held out) or 'test'
            (lines of the validation text).

    Raises:
        ValueError: there are fewer.
        FileNotFoundError, ConnectionError: there is no such data.
    """
    text, path = _TEXTS[split], from_project(dataset)
    if path.exists() or dataset.startswith((".", "/", "~")):
        lines = _local_lines(path, text)
    else:
        lines = hub_lines(dataset, text, "give a folder that holds train* and valid* as dataset")
    found: list[str] = []
    for line in lines:
        found += [line] * (len(line) > LONG)
        if len(found) == count:
            named = content_of([*found, f"blocks of {block}, {held_out} held out"])
            return Lines(dataset, split, found, named, [], block, held_out)
    raise ValueError(f"The {text} text of dataset={dataset!r} holds {len(found)} lines of more "
                     f"than {LONG} characters, and {count} are asked for. Ask for fewer "
                     f"({'eval_docs' if split == 'test' else 'lines'}), or give a longer text.")


def documents_of(config, split: str) -> Documents:
    """What a run's settings read of a split: documents, or with `lines`, long lines of a text.

    Args:
        config: has dataset, and perhaps lines, calibration_docs, eval_docs and seq_len.

    Raises:
        ValueError: `lines` is set, and lines have no such split.
    """
    if not getattr(config, "lines", 0):
        return load_documents(config.dataset, split)
    if split not in _TEXTS:
        raise ValueError(f"With lines={config.lines} there is no split {split!r}, only "
                         f"{', '.join(_TEXTS)}.")
    count = config.eval_docs if split == "test" else config.lines
    return load_lines(config.dataset, split, count, config.seq_len, config.calibration_docs)
