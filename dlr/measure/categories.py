"""Token categories, read off decoded text: pure functions of a record and of token counts.

A position's category is that of the token read there, which is what the router sees; only the loss
quartiles speak of the token predicted there. One token may belong to several categories ("(" is
punctuation and code-like; "The" is a stop word, a word start and capitalised), so the columns do
not add up to the number of tokens. Where a statistic needs exactly one label a token, `partition`
gives it.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from dlr.base.encoding import encode
from dlr.measure.record import Record

# rare: the least frequent tokens that together make up this share of running text
RARE_MASS = 0.05
PARTITION = ("whitespace", "number", "stop word", "code-like", "punctuation", "word continuation",
             "capitalised", "word start")                       # first match wins
OTHER = "other"
_CODE = re.compile(r"[_`{}\[\]=<>\\|@#$%^&*~]|\w\(|\(\)|::|->|[A-Za-z]{2}\.[A-Za-z]{2}|[a-z][A-Z]")
_NUMBER = re.compile(r"[+-]?\d[\d.,]*%?")


@lru_cache(maxsize=1)
def stop_words() -> frozenset[str]:
    """scikit-learn's English stop words."""
    # takes a second to import, and views start here
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    return frozenset(ENGLISH_STOP_WORDS)


def frequencies(texts: list[str], tokenizer) -> torch.Tensor:
    """How often each token id occurs in `texts`, `[V]` int64; ids in gaps count as well."""
    ids = np.concatenate([np.zeros(0, np.int64),
                          *(np.array(row, np.int64) for row in encode(tokenizer, texts))])
    return torch.from_numpy(np.bincount(ids, minlength=len(tokenizer)))


def rare_ids(frequency: torch.Tensor, mass: float = RARE_MASS) -> torch.Tensor:
    """`[V]` bool: the least frequent ids that together stay within `mass` of the text."""
    order = frequency.argsort(stable=True)
    share = frequency[order].double().cumsum(0) / frequency.sum().clamp(min=1)
    rare = torch.zeros(len(frequency), dtype=torch.bool)
    rare[order[share <= mass]] = True
    return rare


def _document_flags(tokens: list[str]) -> list[dict[str, bool]]:
    """Categories of one document's tokens that need the text around them."""
    flags = []
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""]):
        core = token.strip()
        letters = bool(core) and core[0].isalnum()
        joined = letters and token[:1].isalnum() and before[-1:].isalnum()
        whole = letters and not joined and not (token[-1:].isalnum() and after[:1].isalnum())
        flags.append({
            "punctuation": bool(core) and all(unicodedata.category(c)[0] in "PS" for c in core),
            "stop word": whole and core.lower() in stop_words(),
            "number": bool(_NUMBER.fullmatch(core)),
            "word start": letters and not joined and not core[0].isdigit(),
            "word continuation": joined and not core[0].isdigit(),
            "whitespace": bool(token) and not core,
            "capitalised": letters and core[0].isupper(),
        })
    return flags


def _code_like(tokens: list[str]) -> list[bool]:
    """Whether each token is part of an unspaced stretch that holds one of code's marks (_CODE)."""
    ends = np.cumsum([len(t) for t in tokens])
    marked = np.zeros(int(ends[-1]) + 1 if len(ends) else 1, np.int64)
    for chunk in re.finditer(r"\S+", "".join(tokens)):
        if _CODE.search(chunk.group()):
            marked[chunk.start():chunk.end()] = 1
    before = np.concatenate([[0], marked.cumsum()])
    return [bool(before[end] - before[end - len(token)]) for token, end in zip(tokens, ends)]


def _quartiles(loss: torch.Tensor) -> np.ndarray:
    """`[n]` 1 (least loss) to 4 (most), 0 where there is no prediction."""
    known = ~loss.isnan()
    quartile = np.zeros(len(loss), np.int64)
    losses = loss[known].double().numpy()
    quartile[known.numpy()] = 1 + np.searchsorted(np.quantile(losses, [0.25, 0.5, 0.75]), losses,
                                                  side="left")
    return quartile


def categories(record: Record, frequency: torch.Tensor | None = None) -> pd.DataFrame:
    """One bool column a category, one row a token.

    The opening token of a document belongs to none. "rare" is there only where `frequency` `[V]` is
    given, and "loss quartile 1..4" rank the dense model's loss at each position, 4 the hardest.

    Raises:
        ValueError: `frequency` does not cover the record's token ids.
    """
    rows = []
    document = record.document.numpy()
    for index in np.unique(document):
        place = np.flatnonzero(document == index)
        tokens = [record.tokens[i] for i in place]
        # the opening token is no text
        tokens[0] = "" if record.position[place[0]] == 0 else tokens[0]
        rows += [f | {"code-like": c} for f, c in zip(_document_flags(tokens), _code_like(tokens))]
    table = pd.DataFrame(rows)
    if frequency is not None:
        if int(record.ids.max()) >= len(frequency):
            raise ValueError(f"Token frequencies cover {len(frequency)} ids, but the record holds "
                             f"id {int(record.ids.max())}; count them with the record's own "
                             "tokenizer.")
        table["rare"] = (rare_ids(frequency)[record.ids] & (record.position > 0)).numpy()
    quartile = _quartiles(record.loss_dense)
    for q in range(1, 5):
        table[f"loss quartile {q}"] = (quartile == q) & (record.position > 0).numpy()
    return table


def partition(table: pd.DataFrame) -> np.ndarray:
    """Exactly one label a token: the first of PARTITION it belongs to, else 'other'."""
    names = np.array([*PARTITION, OTHER])
    member = np.column_stack([*(table[name].to_numpy() for name in PARTITION),
                              np.ones(len(table), bool)])
    return names[member.argmax(1)]


def load_spacy():
    """A spaCy pipeline with a tagger, or None where it or its small English model is missing."""
    try:
        import spacy  # optional, and takes seconds
        return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return None


def part_of_speech(record: Record, pipeline) -> np.ndarray:
    """The coarse part of speech `[n]` of each token's word; '' at white space and opening tokens.

    Args:
        pipeline: maps a text to tokens that have `idx`, `text` and `pos_`, as spaCy's do.
    """
    tags = np.full(len(record), "", dtype=object)
    document = record.document.numpy()
    for index in np.unique(document):
        place = np.flatnonzero(document == index)
        tokens = [record.tokens[i] if record.position[i] else "" for i in place]
        text = "".join(tokens)
        start = 0
        by_character = np.full(len(text) + 1, "", dtype=object)
        for word in pipeline(text):
            by_character[word.idx:word.idx + len(word.text)] = word.pos_
        for i, token in zip(place, tokens):
            if token.strip():
                tags[i] = by_character[start + len(token) - len(token.lstrip())]
            start += len(token)
    return tags
