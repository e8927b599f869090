"""Benchmark tasks as lm-evaluation-harness defines them, from the hub or from local files.

Prompts, metrics, splits and few-shot rules are the harness's own YAML definitions; `--data-dir`
swaps nothing but the source of the rows. Local forms, below the data folder:

    mmlu/dev/<subject>_dev.csv, mmlu/test/<subject>_test.csv
        header question,choice0..choice3,answer; answers 0 to 3
    arc/arc_challenge.jsonl (and arc_challenge_train.jsonl)    query, choices, gold
    gsm8k/train.jsonl, gsm8k/test.jsonl                        question, answer
    blimp/data/<paradigm>.jsonl                                sentence_good, sentence_bad
"""

import csv
import difflib
import functools
import json
import logging
import os
import re
from pathlib import Path

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

FORMS = {"cais/mmlu": "mmlu", "allenai/ai2_arc": "arc", "openai/gsm8k": "gsm8k",
         "nyu-mll/blimp": "blimp"}
SERVED = "mmlu, arc_challenge, gsm8k, blimp"
WIKITEXT = "wikitext103"
# strided perplexities, none of the harness's tasks: see dlr.bench.wikitext
PERPLEXITIES = (WIKITEXT, "embedded")
# Folders of the harness that hold the tasks named in the README; reading its whole index takes half
# a minute.
_USUAL = ("mmlu/default", "arc", "gsm8k", "blimp", "hellaswag", "winogrande", "lambada")


class UnknownTask(ValueError):
    """No task, group or tag of that name; the message gives the nearest names."""


class BadRow(ValueError):
    """A malformed row of a local data file; the message gives file and line."""


# -- rows of local files ---------------------------------------------------------------------------
def _json_rows(path: Path, fields: dict[str, type]) -> list[tuple[str, dict]]:
    """(place, row) of every line of a .jsonl file; each row holds `fields` of the given types."""
    rows = []
    with _open(path) as file:
        for number, line in enumerate(file.buffer, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise BadRow(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); mend or "
                             "remove it.") from None
            except json.JSONDecodeError as error:
                raise BadRow(f"{place}: not JSON ({error.msg} at character {error.pos}); mend or "
                             "remove it.") from None
            for name, kind in fields.items():
                value = row.get(name) if isinstance(row, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise BadRow(f"{place}: {name!r} must be {kind.__name__}, found {value!r}; "
                                 "mend or remove it.")
            rows.append((place, row))
    return _some(rows, path)


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"--data-dir holds no {str(path)!r}. The forms it serves "
                                f"({SERVED}) are described at the top of dlr/bench/tasks.py; "
                                "without --data-dir the task comes from the Hugging Face Hub.")
    return path.open(encoding="utf-8", newline="")


def _some(rows: list, path: Path) -> list:
    if not rows:
        raise BadRow(f"{path}, line 1: the file holds no row.")
    return rows


def _read(reader, path: Path, line: int) -> list[str] | None:
    """The next row of a CSV file; None at its end."""
    try:
        return next(reader, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadRow(f"{path}, line {line}: {error}. Expected UTF-8 text in CSV form, with every "
                     "quote closed.") from error


def _mmlu(folder: Path, subject: str) -> dict[str, list[dict]]:
    splits = {}
    for split in ("dev", "test"):
        path, rows = folder / "mmlu" / split / f"{subject}_{split}.csv", []
        with _open(path) as file:
            reader = csv.reader(file)
            header = _read(reader, path, 1)
            if not header or len(header) != 6 or header[5].strip() in ("0", "1", "2", "3"):
                raise BadRow(f"{path}, line 1: the first line must be a header of six columns "
                             f"(question, four choices, answer); found {header!r}.")
            start = reader.line_num + 1
            while (row := _read(reader, path, start)) is not None:
                if row:
                    if len(row) != 6 or row[5].strip() not in ("0", "1", "2", "3"):
                        raise BadRow(f"{path}, line {start}: a row is question, four choices and "
                                     f"an answer from 0 to 3; found {len(row)} fields ending in "
                                     f"{row[-1]!r}.")
                    rows.append({"question": row[0], "subject": subject, "choices": row[1:5],
                                 "answer": int(row[5])})
                start = reader.line_num + 1
        splits[split] = _some(rows, path)
    return splits


def _arc_rows(path: Path) -> list[dict]:
    rows = []
    for place, row in _json_rows(path, {"query": str, "choices": list, "gold": int}):
        labels = "ABCDEFGH"[:len(row["choices"])]
        if not 2 <= len(row["choices"]) <= 8 or not 0 <= row["gold"] < len(labels):
            raise BadRow(f"{place}: gold={row['gold']} does not name one of its "
                         f"{len(row['choices'])} choices.")
        rows.append({"question": re.sub(r"^Question: ", "", row["query"]),
                     "answerKey": labels[row["gold"]],
                     "choices": {"text": [str(c) for c in row["choices"]], "label": list(labels)}})
    return rows


def _arc(folder: Path, name: str) -> dict[str, list[dict]]:
    stem = folder / "arc" / name.lower().replace("-", "_")
    splits = {"test": _arc_rows(stem.with_suffix(".jsonl"))}
    train = stem.with_name(f"{stem.name}_train.jsonl")
    return splits | ({"train": _arc_rows(train)} if train.is_file() else {})


def _gsm8k(folder: Path, name: str) -> dict[str, list[dict]]:
    splits = {}
    for split in ("train", "test"):
        splits[split] = []
        for place, row in _json_rows(folder / "gsm8k" / f"{split}.jsonl",
                                     {"question": str, "answer": str}):
            if "####" not in row["answer"]:
                raise BadRow(f"{place}: the answer must end in '#### <number>', found "
                             f"{row['answer'][-40:]!r}.")
            splits[split].append({"question": row["question"], "answer": row["answer"]})
    return splits


def _blimp(folder: Path, name: str) -> dict[str, list[dict]]:
    fields = {"sentence_good": str, "sentence_bad": str}
    rows = _json_rows(folder / "blimp" / "data" / f"{name}.jsonl", fields)
    return {"train": [{field: row[field] for field in fields} for _, row in rows]}


_READERS = {"mmlu": _mmlu, "arc": _arc, "gsm8k": _gsm8k, "blimp": _blimp}


def local_rows(form: str, name: str, folder: str | Path) -> dict[str, list[dict]]:
    """Split name to rows, in the hub data set's own form, of one local task.

    Args:
        form: mmlu, arc, gsm8k or blimp; name: the hub configuration (a subject, 'ARC-Challenge', a
            paradigm).

    Raises:
        FileNotFoundError, BadRow.
    """
    return _READERS[form](Path(folder).expanduser(), name)


# -- the harness's own definitions -----------------------------------------------------------------
def _dataset(form: str, name: str, folder: str, **_) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(rows)
                        for split, rows in local_rows(form, name, folder).items()})


class _LocalFactory(TaskFactory):
    """The harness's task factory, except that rows of the served data sets come from `folder`."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def _load_full_config(self, entry, overrides=None):
        config = super()._load_full_config(entry, overrides)
        form, name = FORMS.get(config.get("dataset_path")), config.get("dataset_name") or ""
        if form is None or (form == "arc" and name != "ARC-Challenge"):
            return config
        config["custom_dataset"] = functools.partial(_dataset, form=form, name=name,
                                                     folder=self.folder)
        config["dataset_kwargs"] = None
        if form == "arc":
            # The data set's validation split is not served; without a training file the few-shot
            # examples are other rows of the test split (`fewshot_split` makes the harness leave out
            # the row in question).
            config["validation_split"] = None
            if not (Path(self.folder) / "arc" / "arc_challenge_train.jsonl").is_file():
                config |= {"training_split": None, "fewshot_split": config["test_split"]}
        return config


@functools.lru_cache(maxsize=4)
def _manager(usual: bool):
    # its index warns of duplicates among its own files
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(Path(lm_eval.tasks.__file__).parent / name) for name in _USUAL]
    return TaskManager(include_path=folders, include_defaults=False) if usual else TaskManager()


def manager_for(names: list[str]):
    """The harness's task manager that knows `names`, or UnknownTask with the nearest names."""
    manager = _manager(True)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = _manager(False)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *PERPLEXITIES], n=4,
                                             cutoff=0.5)
            raise UnknownTask(f"There is no task {name!r}." + (" The nearest names: "
                                                               f"{', '.join(near)}." if near else
                              " 'lm-eval ls tasks' lists all of them."))
    return manager


def load_tasks(names: list[str], data_dir: str | None = None,
               num_fewshot: int | None = None) -> dict:
    """{'tasks': {name: Task}, 'groups': {name: Group}} of what is named, ready to evaluate.

    Args:
        data_dir: folder of local files for the data sets it serves; the others come from the hub.
        num_fewshot: as the harness's own option: where a task's definition fixes 0 (BLiMP), it
            stays 0.

    Raises:
        UnknownTask, FileNotFoundError, BadRow; ConnectionError: the hub cannot be reached.
    """
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"--data-dir {str(data_dir)!r} is not a folder.")
    if not names:
        return {"tasks": {}, "groups": {}}
    manager = manager_for(names)
    try:
        if data_dir is not None:
            manager._factory = _LocalFactory(str(Path(data_dir).expanduser()))
        loaded = manager.load(list(names))
    except (BadRow, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "--data-dir" not in str(error):
            raise _unreachable(names, error) from error
        raise
    # the hub's clients raise many classes: offline, DNS, proxies, missing set
    except Exception as error:
        kind = type(error).__name__
        if isinstance(error, OSError) or "Offline" in kind or "Dataset" in kind:
            raise _unreachable(names, error) from error
        raise
    finally:
        manager._factory = TaskFactory()
    for task in loaded["tasks"].values():
        _set_shots(task, num_fewshot)
    return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {})}


def _set_shots(task, num_fewshot: int | None) -> None:
    """The harness's own rule (evaluator.simple_evaluate), and its seed for drawing examples."""
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _unreachable(names: list[str], error: Exception) -> ConnectionError:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return ConnectionError(f"The data of {', '.join(names)} could not be downloaded from the "
                           f"Hugging Face Hub{offline}: {str(error).splitlines()[0]}. Without a "
                           f"network give --data-dir DIR with local files; it serves {SERVED} and "
                           f"{WIKITEXT}.")


def notes_of(task, data_dir: str | None) -> list[str]:
    """What a reader of the task's row has to know about its data."""
    shots = task.get_config("num_fewshot") or 0
    split = task.get_config("fewshot_split")
    if data_dir and shots and split is not None and split == task.get_config("test_split"):
        return ["few-shot examples come from the test split (never the scored row): the folder "
                "holds no training file"]
    return []
