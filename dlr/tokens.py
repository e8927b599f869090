"""Tokens as a person reads them: what is invisible made visible, byte pieces spelled out, widths and kinds.

Pure functions of text; nothing here is HTML. Escaping is the views' business.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

from transformers.convert_slow_tokenizer import bytes_to_unicode
from wcwidth import wcswidth

from dlr.categories import categories, partition, stop_words
from dlr.record import Record

stop_words()                    # read once here: what it imports takes a second, which no first view should wait for
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")          # control, format (direction marks, joiners), unassigned
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"    # letters and signs by category, but nothing is drawn
BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}      # of byte-level vocabularies
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def visible(piece: str, spaces: bool = True) -> str:
    """`piece` with a sign for every character that prints nothing or moves the cursor; spaces only where asked."""
    out = []
    for c in piece:
        if c == " " and not spaces:
            out.append(c)
        elif c in MARKS:
            out.append(MARKS[c])
        elif unicodedata.category(c) in _UNSEEN or c.isspace() or c in _BLANK:
            out.append(f"‹{ord(c):04X}›")
        else:
            out.append(c)
    return "".join(out)


def piece_bytes(tokenizer, ids: list[int]) -> dict[str, str]:
    """Token id to its bytes in hex ("F0 9F"), for those of `ids` that are no whole characters."""
    spelled = {}
    for i in set(ids):
        name = tokenizer.convert_ids_to_tokens(i)
        if name is None or REPLACEMENT not in tokenizer.decode([i], clean_up_tokenization_spaces=False):
            continue
        if byte := _BYTE.fullmatch(name):
            spelled[str(i)] = byte[1].upper()
        elif all(c in BYTES for c in name):
            spelled[str(i)] = " ".join(f"{BYTES[c]:02X}" for c in name)
    return spelled


@dataclass(frozen=True)
class Shown:
    """One token for display: `text` keeps its spaces, `marked` shows them; `note` tells of bytes and what they join to."""
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
    out = [Shown(visible(t, spaces=False), visible(t)) for t in record.tokens]
    start = 0
    while start < len(out):
        end = start
        while end < len(out) and str(int(record.ids[end])) in spelled \
                and record.document[end] == record.document[start]:
            end += 1
        if end > start:
            _spell(record, spelled, out, start, end)
        start = max(end, start + 1)
    return out


def _spell(record: Record, spelled: dict, out: list[Shown], start: int, end: int) -> None:
    """Fills in the byte pieces `start` to `end`: their bytes, and the text they make together."""
    parts = [bytes.fromhex(spelled[str(int(i))]) for i in record.ids[start:end]]
    whole = visible(b"".join(parts).decode("utf-8", errors="replace"))
    for place, part in zip(range(start, end), parts):
        kept = part.decode("utf-8", errors="ignore") if len(part) > 1 else ""
        text = visible(kept, spaces=False) + "⟨" + part.hex(" ").upper() + "⟩"
        together = f", part of “{whole}” (tokens {int(record.position[start])}–{int(record.position[end - 1])})" \
            if end - start > 1 else ""
        out[place] = Shown(text, text, f"bytes {part.hex(' ').upper()}{together}")


def kinds(record: Record) -> list[str]:
    """One label a token: 'opening', 'bytes', or the first category it belongs to (see `dlr.categories.partition`)."""
    if bool((record.position == 0).all()):                 # no text: nothing to rank
        return ["opening"] * len(record)
    labels = partition(categories(record)).tolist()
    return ["opening" if p == 0 else "bytes" if REPLACEMENT in t else label
            for p, t, label in zip(record.position.tolist(), record.tokens, labels)]


class Words:
    """What no budget changes of a record: its tokens for display and a label for each. Made when first asked for."""

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
