"""Five domains of text, cut from public files into a mixture: what `python -m dlr mixture` writes.

The files lie below one folder, as their repositories hold them (`SOURCES` has the places); Python
source is the running interpreter's. Documents are about 1,800 characters, so that no domain fills
more of a token budget than another, and what is cut from one book or file is one group. A source
file's group is its name in the embedded corpus: the embedded base has not seen the docstrings of
those that are tested on.
"""

import hashlib
import json
import re
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dlr.base.corpus import SPLITS, source_files, split_of
from dlr.base.data import folder_texts, read_text
from dlr.base.folder import atomic_folder
from dlr.base.mixture import RECORDS
from dlr.progress import tqdm
from dlr.runs import from_project

SIZE = 1800               # characters of a piece, at least
LEAST = 25                # documents a domain: fewer leave a split without any
_PROSE = re.compile(r"\n\s*\n|(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)[.!?][\"'”’)]*\s")
_LINE = re.compile(r"\n")
_MARKS = re.compile(r"<<.*?>>")                 # GSM8K's calls of a calculator
_TABLES = ("python:encodings/", "python:pydoc_data/", "python:_sysconfigdata")   # generated
Groups = dict[str, list[str]]                   # documents by what decides their split


def pieces(text: str, ends: re.Pattern, size: int = SIZE) -> list[str]:
    """Consecutive pieces of `text`, each cut at the first of `ends` after `size` characters.

    What is left at the end, less than `size`, is no piece.
    """
    cut, start = [], 0
    for match in ends.finditer(text):
        if match.end() - start >= size:
            cut.append(text[start:match.end()])
            start = match.end()
    return cut


# -- domains -------------------------------------------------------------------------------------
def _alone(texts: list[str]) -> Groups:
    """Each text its own group, under the name that it has when it is read back."""
    return {text: [text] for text in map(str.strip, texts)}


def _articles(folder: Path) -> Groups:
    long = [text for text in folder_texts(folder) if len(text) > 1500]
    return _alone([(pieces(text, _PROSE) or [text])[0] for text in long])


def _stories(folder: Path) -> Groups:
    stories = {}
    for path in sorted(folder.glob("*.txt")):
        if not re.search("lowercase|valid", path.name):
            # the last story of a file is cut off where the file is
            stories |= {" ".join(text.split())[:150]: text for text in folder_texts(path)[:-1]}
    texts = list(stories.values())
    joined = ["\n\n".join(texts[place:place + 3]) for place in range(0, len(texts) - 2, 3)]
    return _alone([text for text in joined if len(text) > 1200])


def _problems(path: Path) -> Groups:
    rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    solved = [f"Question: {row['question']}\nAnswer: {_MARKS.sub('', row['answer'])}"
              for row in rows]
    return _alone(["\n\n".join(solved[place:place + 4])
                   for place in range(0, len(solved) - 3, 4)])


def _books(folder: Path) -> Groups:
    books = {f"novels/{path.parent.name}/{path.stem}": read_text(path)
             for path in sorted(folder.glob("*/*.md"))}
    # title, author and year stand above a rule of dashes
    return {name: pieces(text.split("-------", 1)[-1], _PROSE) for name, text in books.items()}


def _python(_: Path) -> Groups:
    groups = {}
    for name, path in source_files(()):
        if not name.startswith(_TABLES):
            with tokenize.open(path) as file:
                groups[name] = pieces(file.read(), _LINE)
    return groups


class Source(NamedTuple):
    """Where a domain's documents come from, and how they are cut."""
    read: Callable[[Path], Groups]
    place: str                      # below the folder of public files
    origin: str
    licence: str
    documents: str


SOURCES = {
    "encyclopaedia": Source(_articles, "enwiki-extract", "English Wikipedia, by WikiExtractor",
                            "CC BY-SA 3.0", "openings of articles over 1,500 characters, each "
                            "under its title"),
    "mathematics": Source(_problems, "gsm8k/train.jsonl", "GSM8K, train (Cobbe et al. 2021; "
                          "github.com/openai/grade-school-math)", "MIT",
                          "four problems with their answers, without calculator marks"),
    "novels": Source(_books, "classic-books-children", "children's classics, markdown "
                     "(github.com/mlschmitt/classic-books-markdown)", "public domain (US)",
                     "pieces of all books; a book is one group"),
    "python": Source(_python, "", "the standard library of the running Python", "PSF-2.0",
                     "pieces of source files without tests and tables; a file is one group"),
    "stories": Source(_stories, "tinystories", "TinyStories, train (Eldan and Li 2023)",
                      "CDLA-Sharing-1.0", "three stories over 1,200 characters together"),
}


# -- the mixture ---------------------------------------------------------------------------------
def chosen(groups: Groups, count: int) -> list[tuple[str, str]]:
    """About `count` documents with their groups, each split with its share of them.

    Groups take turns, and give documents from all over themselves, so that the first few documents
    of a split come from all of its groups.

    Raises:
        ValueError: no group falls into some split.
    """
    documents = []
    for split, share in SPLITS.items():
        keys = [key for key in groups if groups[key] and split_of(key) == split]
        keys.sort(key=lambda key: hashlib.sha256(key.encode()).digest())
        turns = sorted((turn, place) for place, key in enumerate(keys)
                       for turn in range(len(groups[key])))[:max(1, round(share * count))]
        if not turns:
            raise ValueError(f"none of {len(groups)} groups of documents falls into the {split} "
                             "split")
        taken = Counter(place for _, place in turns)
        for turn, place in turns:
            texts = groups[keys[place]]
            documents.append((keys[place], texts[int((turn + 0.5) * len(texts) / taken[place])]))
    return documents


def _documents(name: str, folder: Path, count: int) -> list[tuple[str, str]]:
    source = SOURCES[name]
    if not (folder / source.place).exists():
        raise FileNotFoundError(f"{str(folder)!r} has no {source.place}, which the domain {name} "
                                f"is cut from ({source.origin}). Put it there, or name the folder "
                                "that holds it.")
    try:
        return chosen(source.read(folder / source.place), count)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The domain {name} cannot be cut from {str(folder / source.place)!r} "
                         f"({source.origin}): {error}.") from error


def _record(key: str, text: str) -> str:
    record = {"text": text} if key == text else {"text": text, "group": key}
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_mixture(data_dir: str | Path, out: str | Path, per_domain: int = 1500) -> pd.DataFrame:
    """Writes a mixture of all SOURCES to the folder `out`, whole or not at all.

    Returns: how many documents a domain (row) has in each split (column).

    Raises:
        FileNotFoundError: `data_dir` lacks a source. FileExistsError: something is in `out`.
        ValueError: `per_domain` is too small, or a source is not what it should be.
    """
    if per_domain < LEAST:
        raise ValueError(f"--per-domain {per_domain} must be {LEAST} or more: every split needs "
                         "documents of every domain.")
    out, data_dir = Path(out).expanduser(), from_project(data_dir)
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{str(out)!r} is there already; give another name, or remove it.")
    counts = {}
    with atomic_folder(out) as temporary:
        for name in (bar := tqdm(SOURCES, unit="domain")):
            bar.set_description(name)
            documents = _documents(name, data_dir, per_domain)
            (temporary / name).mkdir()
            (temporary / name / RECORDS).write_text(
                "".join(_record(key, text) for key, text in documents), encoding="utf-8",
                newline="\n")
            counts[name] = Counter(split_of(key) for key, _ in documents)
        table = pd.DataFrame(counts, index=list(SPLITS)).T
        (temporary / "SOURCES.md").write_text(_sources(table), encoding="utf-8")
    return table


def _sources(counts: pd.DataFrame) -> str:
    """The text of SOURCES.md: origin, licence and form of each domain, and documents by split."""
    table = pd.DataFrame([{"domain": name, "source": source.origin, "licence": source.licence,
                           "a document": source.documents, **counts.loc[name]}
                          for name, source in SOURCES.items()])
    return ("# Sources\n\nEach domain's records are in its own folder. The licences of the sources "
            f"go with them.\n\n{table.to_markdown(index=False)}\n")
