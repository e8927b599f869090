"""Mixtures: folders whose sub-folders are domains, kept in equal parts wherever they are cut short.

    MIXTURE/SOURCES.md                  where it comes from; no text
    MIXTURE/<domain>/documents.jsonl    a record a line: text and, where several records come from
                                        one book or file, the name of that group

Records of a group fall into one split, so that no book is read in training and tested on. The
documents of a split take turns over the domains: any first n of them hold as many of each. One
documents.jsonl makes a folder a mixture; `python -m dlr mixture` prepares one of five domains.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

from dlr.base.corpus import split_of

RECORDS = "documents.jsonl"


class Row(NamedTuple):
    """A document of a folder, what decides its split (its group, or itself), and its domain."""
    text: str
    key: str
    domain: str = ""


def files_by_domain(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each domain; all of them under '' where `folder` is no mixture.

    Raises:
        ValueError: a mixture holds text that belongs to no domain's records.
    """
    records = [file for file in files if file.name == RECORDS and file.parent.parent == folder]
    if not records:
        return {"": files}
    notes = [file for file in files if file.parent == folder and file.suffix == ".md"]
    stray = [file for file in files if file not in records and file not in notes]
    if stray:
        raise ValueError(f"{str(folder)!r} is a mixture of domains, as {RECORDS} in "
                         f"{records[0].parent.name!r} says; {str(stray[0])!r} belongs to none of "
                         f"them. Give its text as records of <domain>/{RECORDS}, or move it away.")
    return {file.parent.name: [file] for file in records}


def of_split(rows: list[Row], split: str, dataset: str) -> list[Row]:
    """The rows of `split`; those of a mixture in an order that takes turns over its domains.

    Raises:
        ValueError: a domain has no document in that split.
    """
    chosen = [row for row in rows if split_of(row.key) == split]
    missing = {row.domain for row in rows} - {row.domain for row in chosen}
    if missing - {""}:
        raise ValueError(f"The {split} split of dataset={dataset!r} holds no document of "
                         f"{', '.join(sorted(missing))}; every domain needs one in every split. "
                         "Give it more documents, or more groups of them.")
    return [chosen[place] for place in evenly([row.domain for row in chosen])]


def evenly(domains: Sequence[Hashable], sizes: Sequence[float] | None = None) -> list[int]:
    """Places in `domains` in turn: next is always the domain that has had least so far.

    Within a domain the order stays. A domain that is used up leaves the rest to the others.

    Args:
        sizes: how much each place counts, for example its characters (default: 1 each).
    """
    waiting = defaultdict(deque)
    for place, domain in enumerate(domains):
        waiting[domain].append(place)
    turns = [(0.0, domain) for domain in sorted(waiting)]
    order = []
    while turns:
        used, domain = heapq.heappop(turns)
        place = waiting[domain].popleft()
        order.append(place)
        if waiting[domain]:
            heapq.heappush(turns, (used + (sizes[place] if sizes else 1), domain))
    return order
