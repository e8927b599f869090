"""Text in, token blocks out: the embedded corpus, local files, or a Hub dataset.

A local folder may be a mixture of domains: see `dlr.base.mixture`.

Notation: b batch, s sequence length. Training data is packed (documents joined by the end-of-text
token, cut into blocks of s); evaluation data keeps one document a row, right-padded, so that
intervals can be taken over documents. Text becomes ids in `dlr.base.encoding` alone: a special
token that a text spells out stays text.
"""

import csv
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dlr.base.corpus import SPLITS, content_hash, embedded_corpus
from dlr.base.encoding import encode, opening_token, padding_token
from dlr.base.mixture import Row, evenly, files_by_domain, of_split
from dlr.progress import tqdm
from dlr.runs import from_project

HUB_ALIASES = {"wikitext-103-raw-v1": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
               "wikitext-2-raw-v1": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
_WIKITEXT_TITLE = re.compile(r"(?m)^(?= = [^=\n]+ = *$)")
_WIKI_DOC = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.DOTALL)
# A marker between documents stands alone on its line, or is glued to the document it opens.
# Anywhere else, as in a manual that speaks of it, it is text.
_SEPARATOR = re.compile(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$"
                        r"|(?:^|(?<=[\s.!?…\"”’)]))<\|endoftext\|>(?=\w)")
SHORTEST = 200                      # characters; shorter texts are no documents
_SUFFIXES = {".txt", ".md", ".json", ".jsonl"}


@dataclass(frozen=True)
class Documents:
    """Texts of one split, the hash that names them in results, and each text's domain, if any."""
    source: str
    split: str
    texts: list[str]
    hash: str
    domains: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.domains and len(self.domains) != len(self.texts):
            raise ValueError(f"{len(self.texts)} texts came with {len(self.domains)} domains; "
                             "give one a text, or none at all.")

    def __len__(self) -> int:
        return len(self.texts)

    def stream(self, tokenizer, seed: int, max_tokens: int | None = None) -> np.ndarray:
        """Token ids `[n]` to train on, of texts in an order drawn by `seed`; see `packed`."""
        order = np.random.default_rng(seed).permutation(len(self.texts))
        if self.domains:
            order = order[evenly([self.domains[index] for index in order],
                                 [len(self.texts[index]) for index in order])]
        texts: list[str] = []
        characters = 0
        for index in order:
            texts.append(self.texts[index])
            characters += len(texts[-1])
            if max_tokens and characters > 8 * max_tokens:   # no token here has over 8 characters
                break
        return token_stream(texts, tokenizer)[:max_tokens]

    def rows(self, tokenizer, max_len: int, limit: int | None = None) -> list[list[int]]:
        """Token ids of each text, opened and cut to `max_len`; see `padded_batches`."""
        opening = opening_token(tokenizer)
        encoded = encode(tokenizer, [text[:12 * max_len] for text in self.texts[:limit]])
        return [[opening, *ids][:max_len] for ids in encoded]


def content_of(texts: list[str]) -> str:
    """Sixteen hex digits that name texts in results."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text file, without its byte order mark.

    Raises:
        ValueError: the file is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 (byte {error.start}); convert it first "
                         "(iconv -t UTF-8).") from None


def _file_rows(path: Path, domain: str) -> list[Row]:
    """Documents of one file: `<doc>` blocks, JSON, or text cut at `<|endoftext|>` or chapters.

    Raises:
        ValueError: the file is no UTF-8, no JSON, or holds JSON records without a text.
    """
    raw = read_text(path)
    if path.suffix in (".json", ".jsonl"):
        rows = [(text.strip(), group) for text, group in _json_records(path, raw)]
        return [Row(text, group or text, domain) for text, group in rows if len(text) >= SHORTEST]
    if "<doc " in raw[:200]:
        texts = _WIKI_DOC.findall(raw)
    elif _SEPARATOR.search(raw):
        texts = _SEPARATOR.split(raw)
    else:
        texts = re.split(r"\n(?=## )" if path.suffix == ".md" else r"\n{3,}", raw)
    return [Row(text, text, domain) for text in _long_enough(texts)]


def _long_enough(texts: list[str]) -> list[str]:
    return [text for text in map(str.strip, texts) if len(text) >= SHORTEST]


def _json_records(path: Path, raw: str) -> list[tuple[str, str]]:
    """Text and group of each record; '' where it has no group."""
    try:
        if path.suffix == ".json":
            records = json.loads(raw)
        else:           # splitlines() would also cut at U+2028 and U+0085, which texts may hold
            records = [json.loads(line) for line in raw.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    rows = records if isinstance(records, list) else [None]
    texts = [row.get("text") if isinstance(row, dict) else row for row in rows]
    wrong = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"{str(path)!r} must hold a list of texts, or of records with a text "
                         f"under 'text'; record {wrong} is none.")
    groups = [row.get("group") if isinstance(row, dict) else None for row in rows]
    return [(text, "" if group is None else str(group)) for text, group in zip(texts, groups)]


def folder_texts(path: str | Path) -> list[str]:
    """All documents of a file, or of every text file below a folder, in the order of their names.

    A relative path is looked for from here, then from the project's root.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there are files, but no document in them.
    """
    return [row.text for row in _folder_rows(path)]


def _folder_rows(path: str | Path) -> list[Row]:
    path = from_project(path)
    if not path.exists():
        raise FileNotFoundError(f"No file or folder at {str(path)!r}. Give a folder of .txt, .md, "
                                ".json or .jsonl files, or dataset='embedded', which needs none.")
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob("*") if file.is_file()
        and (file.suffix in _SUFFIXES or file.name.startswith("wiki_")))
    rows = []
    for domain, parts in files_by_domain(path, files).items():
        added = [row for file in parts for row in _file_rows(file, domain)]
        if not added:
            raise ValueError(f"{str(path / domain)!r} holds no document of {SHORTEST} characters "
                             "or more in .txt, .md, .json or .jsonl files; an empty dataset cannot "
                             "be trained or evaluated on.")
        rows += added
    return rows


def hub_lines(dataset: str, split: str, remedy: str) -> list[str]:
    """The texts of the rows of a Hub dataset, or of one of HUB_ALIASES.

    Raises:
        ConnectionError: it could not be loaded; the message ends with `remedy`.
    """
    from datasets import load_dataset  # takes seconds to import, and only the Hub needs it
    name, config = HUB_ALIASES.get(dataset, (dataset, None))
    try:
        return load_dataset(name, config, split=split)["text"]
    except Exception as error:          # the Hub raises a different class for each kind of failure
        raise ConnectionError(f"The dataset {name!r} could not be loaded from the Hugging Face Hub "
                              f"({type(error).__name__}). Without a network {remedy}.") from error


def _hub_texts(dataset: str, split: str) -> list[str]:
    hub_split = split if split in ("train", "test") else "validation"
    lines = hub_lines(dataset, hub_split, "use dataset='embedded', or a folder of text files")
    texts = _long_enough(wikitext_articles("".join(lines)))
    half = len(texts) // 2     # no Hub dataset has a calibration split: half the validation one
    return {"calibration": texts[:half], "validation": texts[half:]}.get(split, texts)


def wikitext_articles(text: str) -> list[str]:
    """The articles of a WikiText file, split at first-level titles (` = Title = ` on a line)."""
    return [part for part in _WIKITEXT_TITLE.split(text) if part.strip()]


def read_wikitext(path: Path) -> str:
    """A WikiText file: plain text, or one-column CSV whose rows are joined.

    Raises:
        ValueError: a row has several columns; the message names file and line.
    """
    raw = path.read_text(encoding="utf-8")
    if not raw.startswith('"'):
        return raw
    parts = []
    reader = csv.reader(raw.splitlines(keepends=True))
    for row in reader:
        if len(row) > 1:
            raise ValueError(f"{path}, line {reader.line_num}: one column was expected, {len(row)} "
                             "found.")
        parts.extend(row)
    return "".join(parts)


def load_documents(dataset: str, split: str) -> Documents:
    """Documents of `split` (see SPLITS) of 'embedded', a local path, or a Hub dataset."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if dataset == "embedded":
        frame = embedded_corpus()
        rows = frame[frame["split"] == split]
        return Documents(dataset, split, rows["text"].tolist(), content_hash(rows))
    if from_project(dataset).exists() or dataset.startswith((".", "/", "~")):
        rows = of_split(_folder_rows(dataset), split, dataset)
    else:
        rows = [Row(text, text) for text in _hub_texts(dataset, split)]
    if not rows:
        raise ValueError(f"The {split} split of dataset={dataset!r} is empty; every split needs at "
                         "least one document.")
    texts, domains = [row.text for row in rows], [row.domain for row in rows if row.domain]
    return Documents(dataset, split, texts, content_of(texts + domains), domains)


def token_stream(texts: list[str], tokenizer, describe: str = "tokenising") -> np.ndarray:
    """All texts as one stream of token ids `[n]` (uint32), each document opened by `opening_token`.

    Raises:
        ValueError: the tokenizer has no opening token, or cannot keep a special token that a text
            spells out as text.
    """
    start_id = opening_token(tokenizer)
    parts = []
    starts = range(0, len(texts), 512)
    for start in tqdm(starts, desc=describe, unit="batch", disable=len(texts) < 4096):
        for ids in encode(tokenizer, texts[start:start + 512]):
            parts.append(np.array([start_id, *ids], dtype=np.uint32))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


class PackedBlocks(torch.utils.data.Dataset):
    """Blocks of `seq_len` tokens, in an order shuffled by `seed`. Item: {'input_ids': `[s]`}."""

    def __init__(self, stream: np.ndarray, seq_len: int, seed: int = 0):
        if len(stream) < seq_len:
            raise ValueError(f"The training text holds {len(stream)} tokens, fewer than one block "
                             f"of seq_len={seq_len}; give more text or a smaller seq_len.")
        self.blocks = stream[:len(stream) // seq_len * seq_len].reshape(-1, seq_len)
        self.order = np.random.default_rng(seed).permutation(len(self.blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.blocks[self.order[index]].astype(np.int64))}


def packed(documents: Documents, tokenizer, seq_len: int, seed: int = 0,
           max_tokens: int | None = None) -> PackedBlocks:
    """Training blocks of `documents`, taken in shuffled order up to `max_tokens` tokens.

    Of a mixture every domain gives about as many characters.
    """
    return PackedBlocks(documents.stream(tokenizer, seed, max_tokens), seq_len, seed)


def padded_batches(documents: Documents, tokenizer, max_len: int, batch_size: int,
                   limit: int | None = None) -> list[dict[str, torch.Tensor]]:
    """One document a row, cut to `max_len`, right-padded: input_ids, attention_mask `[b, s]`.

    Rows are sorted by length, so that little is padded; `row` `[b]` holds places in `documents`.

    Raises:
        ValueError: the tokenizer has no opening token, or cannot keep a special token that a text
            spells out as text.
    """
    rows = documents.rows(tokenizer, max_len, limit)
    pad = padding_token(tokenizer)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    batches = []
    for start in range(0, len(order), batch_size):
        places = order[start:start + batch_size]
        lengths = torch.tensor([len(rows[place]) for place in places])
        width = int(lengths.max())
        batches.append({
            "input_ids": torch.tensor([rows[place] + [pad] * (width - len(rows[place]))
                                       for place in places]),
            "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long(),
            "row": torch.tensor(places)})
    return batches
