"""A folder of local benchmark files in the forms `--data-dir` takes, with a few rows of each."""

import csv
import json
from pathlib import Path

SUBJECT, PARADIGM = "anatomy", "causative"
WORDS = ["array", "list of items", "number", "file", "module", "string value", "graph", "tree", "matrix", "node", "path"]


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(folder: Path, rows: int = 7) -> Path:
    """mmlu (one subject), arc_challenge, gsm8k, blimp (one paradigm) and wikitext-103 below `folder`."""
    def word(i: int) -> str:
        return WORDS[i % len(WORDS)]

    _jsonl(folder / "arc" / "arc_challenge.jsonl", [
        {"query": f"Question: Which is a {word(i)}, {i}?", "choices": [word(i + k) for k in range(3 + i % 3)], "gold": i % 3}
        for i in range(rows)])
    for split in ("train", "test"):
        _jsonl(folder / "gsm8k" / f"{split}.jsonl", [
            {"question": f"A {word(i)} holds {i} items{' and more' * i}. How many?", "answer": f"It is {i}.\n#### {i}"}
            for i in range(rows)])
    _jsonl(folder / "blimp" / "data" / f"{PARADIGM}.jsonl", [
        {"sentence_good": f"The {word(i)} returns the {word(i + 1)}{' of the file' * (i % 4)}.",
         "sentence_bad": f"The {word(i)} return of {word(i + 1)}{' of the file' * (i % 4)}."} for i in range(rows)])
    for split in ("dev", "test"):
        path = folder / "mmlu" / split / f"{SUBJECT}_{split}.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            writer.writerows([[f"What is\na {word(i)}?", *(word(i + k) for k in range(4)), i % 4] for i in range(rows)])
    text = "".join(f" = Title {i} = \n\n The {word(i)} returns a {word(i + 2)} . " + "It holds values . " * 20 + "\n"
                   for i in range(3))
    (folder / "wikitext-103").mkdir()
    (folder / "wikitext-103" / "test.txt").write_text(text, encoding="utf-8")
    return folder
