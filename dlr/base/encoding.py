"""From text to token ids, in one place: a special token that a text spells out stays text.

Transformers would read `<|endoftext|>` in a manual as the end of that text. Here the only special
token of a document is the one that `opening_token` puts before it. Tokens that a tokenizer adds
without calling them special (runs of spaces, `<think>`) are vocabulary like any other.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dlr.routing.weights import REVISION, causal_lm

# Raise this when ids of the same text change: what was stored under other rules is then made anew.
RULES = 2
_SURROGATE = re.compile("[\ud800-\udfff]")


def encode(tokenizer, texts: str | list[str]) -> list[int] | list[list[int]]:
    """Token ids of one text, or of each of several, without any special token.

    Raises:
        ValueError: the tokenizer makes special tokens of what a text spells out, whatever it is
            asked; or a text has half characters (surrogates), which stand for bytes that were no
            UTF-8.
    """
    if isinstance(texts, str):
        return encode(tokenizer, [texts])[0]
    if not len(texts):
        return []
    texts = list(texts)
    broken = next((text for text in texts if _SURROGATE.search(text)), None)
    if broken is not None:
        raise ValueError(f"The text {ascii(broken[:60])} holds bytes that are no UTF-8; convert it "
                         "first (iconv -t UTF-8).")
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                     verbose=False)["input_ids"]
    special, unknown = _special_ids(tokenizer), getattr(tokenizer, "unk_token", None)
    for place, (text, ids) in enumerate(zip(texts, rows)):
        spelled_out = unknown and unknown in text and tokenizer.unk_token_id in ids
        if spelled_out or not special.isdisjoint(ids):
            rows[place] = _encode_plainly(tokenizer, text, special)
    return rows


def _special_ids(tokenizer) -> set[int]:
    """Ids that no text may have: special tokens, but the one for unknown characters only."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ends = {getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    unknown = {getattr(tokenizer, "unk_token_id", None)} - ends
    return ({i for i, token in added.items() if token.special} | ends) - unknown - {None}


def _encode_plainly(tokenizer, text: str, special: set[int]) -> list[int]:
    """Ids of `text` by a copy of the tokenizer whose special tokens have names no text spells.

    Unigram and word-level models hold their special tokens among the pieces of text, so that asking
    them to split those is not enough.
    """
    ids = None
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = tokenizer.backend_tokenizer.to_str()
        ids = _plain_backend(state, frozenset(special)).encode(text, add_special_tokens=False).ids
    if ids is None or not special.isdisjoint(ids):
        raise ValueError(f"The tokenizer {_name(tokenizer)} reads special tokens out of ordinary "
                         f"text (here: {text[:60]!r}) although it is asked not to; use a fast "
                         "tokenizer (tokenizer.json) for this model, or leave such texts out.")
    return ids


@lru_cache(maxsize=2)
def _plain_backend(state: str, special: frozenset[int]):
    state = json.loads(state)
    state["truncation"] = state["padding"] = state["post_processor"] = None
    model, hidden = state["model"], {}
    for token in state["added_tokens"]:
        if token["special"] and token["content"] != model.get("unk_token"):
            hidden[token["content"]] = f"\ufdd0{token['id']}\ufdd0"
            token |= {"content": hidden[token["content"]], "normalized": False}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        hidden |= {piece: f"\ufdd0{i}\ufdd0" for piece, i in vocab.items()
                   if i in special and piece != model.get("unk_token")}
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    else:                                 # Unigram: pieces with their scores, the place is the id
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        pairs = [(pair, pair if isinstance(pair, list) else pair.split(" "))
                 for pair in model["merges"]]
        model["merges"] = [pair for pair, parts in pairs
                           if hidden.keys().isdisjoint([*parts, "".join(parts)])]
    return Tokenizer.from_str(json.dumps(state))


def _name(tokenizer) -> str:
    return f"{type(tokenizer).__name__} of {getattr(tokenizer, 'name_or_path', '') or 'no name'}"


def tokenizer_of(model, folder: str | Path | None = None):
    """The tokenizer in checkpoint `folder` where there is one, else that of the base model.

    Raises:
        OSError: neither is there; the message names the base model.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if folder is not None and any((Path(folder) / name).is_file() for name in names):
        return AutoTokenizer.from_pretrained(str(folder))
    base = getattr(causal_lm(model).config, "_name_or_path", "")
    revision = getattr(causal_lm(model), REVISION, "main")
    try:
        return AutoTokenizer.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"The base model {base!r} comes without a tokenizer that can be loaded "
                      f"({type(error).__name__}); save one into the checkpoint's folder with "
                      "tokenizer.save_pretrained(folder).") from error


def opening_token(tokenizer) -> int:
    """The token that opens a document: beginning-of-text if there is one, else end-of-text.

    Raises:
        ValueError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(f"The tokenizer {_name(tokenizer)} has neither a beginning-of-text nor an "
                     "end-of-text token, so no document can be opened: set tokenizer.bos_token or "
                     "tokenizer.eos_token to a token of its vocabulary.")


def padding_token(tokenizer) -> int:
    """The token that fills up rows, which are masked: padding, else end, else beginning-of-text.

    Raises:
        ValueError: it has none of them.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise ValueError(f"The tokenizer {_name(tokenizer)} has neither a padding nor an end-of-text "
                     "token, so rows cannot be filled up: set tokenizer.pad_token or "
                     "tokenizer.eos_token to a token of its vocabulary.")
