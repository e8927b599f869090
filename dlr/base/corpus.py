"""The embedded corpus: English that every machine has once the requirements are installed.

Docstrings of the pinned packages and the standard library, plus Python's own topic documentation,
about 40 MB of source text before paragraphs that occur twice are dropped. One document is one
module. Splits are decided by a hash of the module's name, so that a document never moves when
another package changes.

Some documents are docstrings of tokenizers and spell out `<|endoftext|>`. That is text: they are
kept as they are, content hash included, and `dlr.base.encoding` turns it into ordinary tokens.
Token streams cached under other rules are made anew.

    python -m dlr.base.corpus            # builds the cache, prints sizes and the content hash
"""

import ast
import gc
import hashlib
import importlib.metadata as metadata
import json
import os
import platform
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd

from dlr.progress import tqdm
from dlr.runs import atomic_file, folder_from

# Pinned in requirements.txt: an unpinned dependency would make the corpus drift.
PACKAGES = ("accelerate", "datasets", "jupytext", "lm_eval", "matplotlib", "networkx", "nltk",
            "numpy", "pandas", "papermill", "peft", "pydantic", "scikit-learn", "scipy", "seaborn",
            "sympy", "torch", "transformers")
SPLITS = {"train": 0.90, "calibration": 0.03, "validation": 0.03, "test": 0.04}
RULES = 1                # raise when the rules below change: a new corpus, a new cache
MIN_CHARS = 400          # shorter documents say nothing about context
_SKIPPED_FOLDERS = {"tests", "testing", "test", "_vendor", "site-packages", "idlelib"}


def cache_folder() -> Path:
    """Where derived data is kept between runs: `$DLR_CACHE`, or `~/.cache/dlr`."""
    return folder_from("DLR_CACHE", Path.home() / ".cache" / "dlr")


def split_of(name: str) -> str:
    """The split a document belongs to, from a hash of its name alone."""
    position = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    for split, share in SPLITS.items():
        if position < share:
            return split
        position -= share
    return "train"


def content_hash(frame: pd.DataFrame) -> str:
    """Sixteen hex digits that change when any document of `frame` (columns name, text) does."""
    digest = hashlib.sha256()
    for name, text in zip(frame["name"], frame["text"]):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def _module_docstrings(item: tuple[str, str]) -> tuple[str, list[str]]:
    """All docstrings of one source file, in source order."""
    name, path = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return name, []
    nodes = sorted(_documented(tree), key=lambda node: getattr(node, "lineno", 0))
    return name, [docstring for docstring in map(ast.get_docstring, nodes) if docstring]


def _documented(tree: ast.Module) -> list[ast.AST]:
    """Modules, classes and functions. They stand among statements: expressions are not entered."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes: list[ast.AST] = [tree]
    for node in nodes:                             # which grows meanwhile
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, None)
            nodes += inner if isinstance(inner, list) else []       # a lambda's body is one node
    return [node for node in nodes if isinstance(node, kinds)]


def source_files(packages: tuple[str, ...]) -> list[tuple[str, str]]:
    """(document name, path) of every source file of `packages` and Python, sorted by name."""
    paths = {}
    for package in packages:
        for file in metadata.files(package) or []:
            if file.suffix == ".py" and not _SKIPPED_FOLDERS & set(file.parts):
                paths[f"{package}:{file.as_posix()}"] = str(file.locate())
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib.rglob("*.py"):
        relative = path.relative_to(stdlib)
        if not _SKIPPED_FOLDERS & set(relative.parts):
            paths[f"python:{relative.as_posix()}"] = str(path)
    return sorted(paths.items())


def _topics() -> list[tuple[str, list[str]]]:
    return [(f"topics:{name}", [text]) for name, text in sorted(topics.items())]


def _drop_repeats(modules: list[tuple[str, list[str]]]) -> pd.DataFrame:
    """One row a document; a paragraph seen before, anywhere, is left out.

    Libraries copy argument descriptions from class to class; without this the test split would hold
    paragraphs that were trained on.
    """
    seen: set[bytes] = set()
    rows = []
    for name, docstrings in modules:
        kept = []
        for docstring in docstrings:
            paragraphs = []
            for paragraph in docstring.split("\n\n"):
                words = " ".join(paragraph.split()).lower()
                key = hashlib.md5(words.encode(), usedforsecurity=False).digest()
                if key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph.rstrip())
            if text := "\n\n".join(paragraphs).strip("\n"):
                kept.append(text)
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARS:
            rows.append((name, split_of(name), text))
    return pd.DataFrame(rows, columns=["name", "split", "text"])


def _cache_key(packages: tuple[str, ...]) -> str:
    versions = {p: metadata.version(p) for p in packages} | {"python": platform.python_version()}
    return hashlib.sha256(json.dumps([RULES, versions], sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=2)
def embedded_corpus(packages: tuple[str, ...] = PACKAGES) -> pd.DataFrame:
    """The corpus as a frame of name, split, text; built once (a minute), then cached.

    Raises:
        FileNotFoundError: a package of `packages` is not installed.
    """
    try:
        path = cache_folder() / f"corpus-{_cache_key(packages)}.parquet"
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"The embedded corpus reads docstrings of the package "
                                f"{error.name!r}, which is not installed; run: pip install "
                                "-r requirements.txt") from error
    if path.exists():
        return pd.read_parquet(path)
    files = source_files(packages)
    # a tree holds no cycles, and looking for some takes half of the time
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), initializer=gc.disable) as pool:
        modules = list(tqdm(pool.map(_module_docstrings, files, chunksize=64), total=len(files),
                            desc="reading docstrings (once)", unit="file"))
    frame = _drop_repeats(_topics() + modules)
    with atomic_file(path) as temporary:
        frame.to_parquet(temporary)
    return frame


if __name__ == "__main__":
    corpus = embedded_corpus()
    sizes = corpus.assign(megabytes=corpus["text"].str.len() / 1e6).groupby("split")["megabytes"]
    print(sizes.agg(documents="count", megabytes="sum").round(2).to_string())
    print("content hash", content_hash(corpus))
