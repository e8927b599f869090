"""Perplexity on WikiText-103 (or the embedded test split) a word, a token, and in bits a byte.

Each article is a document of its own, opened by the tokenizer's first token
(`dlr.base.encoding.opening_token`). A window of the model's context (at most `window` tokens) moves
by `stride`; each step scores the `stride` new tokens and takes the rest as context, so every token
is scored once, with at least `window - stride` tokens before it where the article has them. Words
are split at white space and bytes counted in the text as distributed (no detokenising); the
interval is over articles.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from dlr.base.data import hub_lines, load_documents, read_wikitext, wikitext_articles
from dlr.base.encoding import encode, opening_token
from dlr.measure.evaluate import bootstrap

WINDOW, STRIDE = 512, 256


def texts_of(name: str, data_dir: str | None) -> list[str]:
    """Documents of a perplexity task: 'wikitext103', or 'embedded', which needs no network."""
    if name == "embedded":
        return load_documents("embedded", "test").texts
    return load_articles(data_dir)


def load_articles(data_dir: str | None = None, split: str = "test") -> list[str]:
    """Articles of WikiText-103 (raw): `<data_dir>/wikitext-103/<split>.txt`, or the hub's."""
    if data_dir is None:
        remedy = f"give --data-dir DIR with wikitext-103/{split}.txt"
        return wikitext_articles("".join(hub_lines("wikitext-103-raw-v1", split, remedy)))
    path = Path(data_dir).expanduser() / "wikitext-103" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"--data-dir holds no {str(path)!r} (plain text or one-column "
                                "CSV).")
    return wikitext_articles(read_wikitext(path))


def windows(ids: list[int], window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """(context, scored tokens) of each step over `ids`, whose first token is not scored."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must lie between 1 and window={window}.")
    steps, start = [], 1
    while start < len(ids):
        end = min(len(ids), start + (window if start == 1 else stride))
        steps.append((ids[max(0, end - window - 1):start], ids[start:end]))
        start = end
    return steps


def strided_perplexity(lm, texts: list[str], window: int = WINDOW, stride: int = STRIDE) -> dict:
    """Perplexities of `lm` (any HFLM) over `texts`; windows never exceed its context."""
    window = min(window, lm.max_length)
    stride = min(stride, window)
    opening = opening_token(lm.tokenizer)
    requests, owner = [], []
    for place, text in enumerate(texts):
        steps = windows([opening, *encode(lm.tokenizer, text)], window, stride)
        requests += [(None, context, scored) for context, scored in steps]
        owner += [place] * len(steps)
    scores = lm._loglikelihood_tokens(requests)
    table = pd.DataFrame({
        "words": [len(text.split()) for text in texts],
        "bytes": [len(text.encode()) for text in texts],
        "nll": np.bincount(owner, [-score for score, _ in scores], len(texts)),
        "tokens": np.bincount(owner, [len(scored) for _, _, scored in requests],
                              len(texts)).astype(int)})

    def per(unit: str):
        return lambda sums: np.exp(sums["nll"] / sums[unit])

    out = {"articles": len(texts), "tokens": int(table["tokens"].sum()),
           "words": int(table["words"].sum()), "window": window, "stride": stride,
           "bits_per_byte": float(table["nll"].sum() / np.log(2) / table["bytes"].sum())}
    for name, unit in (("word_perplexity", "words"), ("token_perplexity", "tokens")):
        out[name] = float(per(unit)(table.sum()))
        out[f"{name}_low"], out[f"{name}_high"] = bootstrap(table, per(unit))
    return out
