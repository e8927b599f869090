"""Tokens as a person reads them: what is invisible made visible, byte pieces spelled out, kinds.

Pure functions of text; nothing here is HTML. Escaping is the views' business.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from transformers.convert_slow_tokenizer import bytes_to_unicode
from wcwidth import wcswidth

from dlr.measure.categories import categories, partition, stop_words
from dlr.measure.record import Record

stop_words()                    # what it imports takes a second: here, not at the first view
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
# Categories of control, format (direction marks, joiners) and unassigned characters, of line ends.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# Letters and signs by category, but nothing is drawn.
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}      # of byte-level vocabularies
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def visible(piece: str, spaces: bool = True) -> str:
    """`piece` with a sign for each character that cannot be seen; for spaces only where asked."""
    def sign(c: str) -> str:
        if c in MARKS:
            return MARKS[c] if spaces or c != " " else c
        unseen = unicodedata.category(c) in _UNSEEN or c.isspace() or c in _BLANK
        return f"‹{ord(c):04X}›" if unseen else c

    return "".join(map(sign, piece))


def piece_bytes(tokenizer, ids: list[int]) -> dict[str, str]:
    """Token id to its bytes in hex ("F0 9F"), for those of `ids` that are no whole characters."""
    spelled = {}
    for i in set(ids):
        name = tokenizer.convert_ids_to_tokens(i)
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        if name is None or REPLACEMENT not in text:
            continue
        if byte := _BYTE.fullmatch(name):
            spelled[str(i)] = byte[1].upper()
        elif all(c in BYTES for c in name):
            spelled[str(i)] = " ".join(f"{BYTES[c]:02X}" for c in name)
    return spelled


@dataclass(frozen=True)
class Shown:
    """One token for display: `text` keeps spaces, `marked` shows them, `note` explains bytes."""
    text: str
    marked: str
    note: str = ""

    @property
    def columns(self) -> int:
        """Fixed-width characters it takes (wide ones take two), with room for its depth."""
        return max(3, wcswidth(self.marked))


def shown(record: Record) -> list[Shown]:
    """Every token of a record, ready to be escaped and shown."""
    spelled = record.meta.get("bytes", {})
    tokens = [Shown(visible(t, spaces=False), visible(t)) for t in record.tokens]
    keys = zip([str(i) in spelled for i in record.ids.tolist()], record.document.tolist())
    for (of_bytes, _), places in groupby(enumerate(keys), key=lambda pair: pair[1]):
        if of_bytes:
            _spell(record, spelled, tokens, [place for place, _ in places])
    return tokens


def _spell(record: Record, spelled: dict, tokens: list[Shown], places: list[int]) -> None:
    """Fills in byte pieces that stand side by side: their bytes, and what they make together."""
    parts = [bytes.fromhex(spelled[str(int(record.ids[place]))]) for place in places]
    whole = visible(b"".join(parts).decode("utf-8", errors="replace"))
    first, last = (int(record.position[place]) for place in (places[0], places[-1]))
    together = f", part of “{whole}” (tokens {first}–{last})" if len(places) > 1 else ""
    for place, part in zip(places, parts):
        letters = part.decode("utf-8", errors="ignore") if len(part) > 1 else ""
        text = f"{visible(letters, spaces=False)}⟨{part.hex(' ').upper()}⟩"
        tokens[place] = Shown(text, text, f"bytes {part.hex(' ').upper()}{together}")


def kinds(record: Record) -> list[str]:
    """One label a token: 'opening', 'bytes', or its category by `measure.categories.partition`."""
    if bool((record.position == 0).all()):                 # no text: nothing to rank
        return ["opening"] * len(record)
    labels = partition(categories(record)).tolist()
    return ["opening" if p == 0 else "bytes" if REPLACEMENT in t else label
            for p, t, label in zip(record.position.tolist(), record.tokens, labels)]


class Words:
    """What no budget changes of a record: its tokens for display, and a label for each."""

    def __init__(self, record: Record):
        self.record = record

    @cached_property
    def shown(self) -> list[Shown]:
        return shown(self.record)

    @cached_property
    def kinds(self) -> list[str]:
        return kinds(self.record)


def spans(layers: list[int]) -> str:
    """[0, 1, 2, 5] as '0–2, 5'; 'none' where empty."""
    groups: list[list[int]] = []
    for layer in sorted(layers):
        if groups and groups[-1][1] == layer - 1:
            groups[-1][1] = layer
        else:
            groups.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in groups) or "none"
