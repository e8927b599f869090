"""Perplexity on WikiText-103 (or the embedded test split) with a strided window: a word, a token, in bits a byte.

Each article is a document of its own, opened by the tokenizer's first token (`dlr.encoding.opening_token`). A window of
the model's context (at most `window` tokens) moves by `stride`; each step scores the `stride` new tokens and takes the rest
as context, so every token is scored once, with at least `window - stride` tokens before it where the article has them. Words
are split at white space and bytes counted in the text as distributed (no detokenising); the interval is over articles.
"""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

from dlr.encoding import encode, opening_token
from dlr.evaluate import bootstrap

_TITLE = re.compile(r"(?m)^(?= = [^=\n]+ = *$)")
WINDOW, STRIDE = 512, 256


def articles(text: str) -> list[str]:
    """The articles of a WikiText file, split at first-level titles."""
    return [part for part in _TITLE.split(text) if part.strip()]


def read_text(path: Path) -> str:
    """A WikiText file: plain text, or one-column CSV whose rows are joined. Raises ValueError naming file and line."""
    raw = path.read_text(encoding="utf-8")
    if not raw.startswith('"'):
        return raw
    parts, reader = [], csv.reader(raw.splitlines(keepends=True))
    for row in reader:
        if len(row) > 1:
            raise ValueError(f"{path}, line {reader.line_num}: one column was expected, {len(row)} found.")
        parts.extend(row)
    return "".join(parts)


def texts_of(name: str, data_dir: str | None) -> list[str]:
    """Documents of a perplexity task: 'wikitext103', or 'embedded', which needs neither network nor files."""
    if name == "embedded":
        from dlr.data import load_documents
        return load_documents("embedded", "test").texts
    return load_articles(data_dir)


def load_articles(data_dir: str | None = None, split: str = "test") -> list[str]:
    """Articles of WikiText-103 (raw) from `<data_dir>/wikitext-103/<split>.txt`, or from the hub."""
    if data_dir is None:
        from dlr.data import HUB_ALIASES
        import datasets
        try:
            rows = datasets.load_dataset(*HUB_ALIASES["wikitext-103-raw-v1"], split=split)["text"]
        except Exception as error:          # see dlr.tasks.load_tasks
            raise ConnectionError(f"WikiText-103 could not be downloaded from the Hugging Face Hub ({type(error).__name__}). "
                                  "Without a network give --data-dir DIR with wikitext-103/test.txt.") from error
        return articles("".join(rows))
    path = Path(data_dir).expanduser() / "wikitext-103" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"--data-dir holds no {str(path)!r} (plain text or one-column CSV).")
    return articles(read_text(path))


def windows(ids: list[int], window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """(context, scored tokens) of each step over `ids`, whose first token opens the document and is not scored."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must lie between 1 and window={window}.")
    steps, start = [], 1
    while start < len(ids):
        end = min(len(ids), start + (window if start == 1 else stride))
        steps.append((ids[max(0, end - window - 1):start], ids[start:end]))
        start = end
    return steps


def strided_perplexity(lm, texts: list[str], window: int = WINDOW, stride: int = STRIDE) -> dict:
    """Perplexities of `lm` (a dlr.harness.DLRLM, or any HFLM) over `texts`; windows never exceed its context."""
    window = min(window, lm.max_length)
    stride = min(stride, window)
    opening, requests, owner = opening_token(lm.tokenizer), [], []
    for place, text in enumerate(texts):
        ids = [opening, *encode(lm.tokenizer, text)]
        found = windows(ids, window, stride)
        requests += [(None, context, scored) for context, scored in found]
        owner += [place] * len(found)
    scores = lm._loglikelihood_tokens(requests)
    table = pd.DataFrame({"words": [len(text.split()) for text in texts],
                          "bytes": [len(text.encode()) for text in texts], "nll": 0.0, "tokens": 0})
    table["nll"] = np.bincount(owner, [-score for score, _ in scores], len(texts))
    table["tokens"] = np.bincount(owner, [len(scored) for _, _, scored in requests], len(texts)).astype(int)

    def per(unit: str):
        return lambda rows: float(np.exp(rows["nll"].sum() / rows[unit].sum()))

    out = {"articles": len(texts), "tokens": int(table["tokens"].sum()), "words": int(table["words"].sum()),
           "window": window, "stride": stride,
           "bits_per_byte": float(table["nll"].sum() / np.log(2) / table["bytes"].sum())}
    for name, unit in (("word_perplexity", "words"), ("token_perplexity", "tokens")):
        out[name] = per(unit)(table)
        out[f"{name}_low"], out[f"{name}_high"] = bootstrap(table, per(unit))
    return out
