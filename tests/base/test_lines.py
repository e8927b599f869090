"""Lines of a text: which count, how they become blocks, and what is said where there are too few."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from dlr.base import data
from dlr.base.data import packed, padded_batches
from dlr.base.encoding import encode
from dlr.base.lines import LONG, documents_of, load_lines
from dlr.base.models import NANO
from dlr.train.settings import RunConfig

TRAINED = [f" line {number} " + "of words and numbers " * 6 + "\n" for number in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def folder(tmp_path):
    """Training text as JSON lines, with short lines between; validation text as one-column CSV."""
    lines = [line for long in TRAINED for line in ("", " = Title = \n", "x" * LONG, long)]
    (tmp_path / "train_head.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = [f" paragraph {number} " + 'says "nothing" new ' * (4 + number) + "\n" for number in range(5)]
    (tmp_path / "valid.txt").write_text("".join('"' + line.replace('"', '""') + '"\n' for line in ["", *held]))
    (tmp_path / "test.txt").write_text("never read")
    return tmp_path


def test_long_lines_are_joined_and_cut_and_the_last_blocks_held_out(folder, tokenizer):
    config = RunConfig(dataset=str(folder), lines=10, seq_len=16, eval_len=16, calibration_docs=4, eval_docs=3)
    train = documents_of(config, "train")
    assert train.texts == TRAINED[:10]
    ids = encode(tokenizer, "\n\n".join(TRAINED[:10]))
    ids = [*tokenizer("")["input_ids"], *ids]
    whole = np.array(ids[:(len(ids) - 1) // 16 * 16]).reshape(-1, 16)
    trained = packed(train, tokenizer, 16, seed=3).blocks
    assert sorted(map(tuple, trained.tolist())) == sorted(map(tuple, whole[:-4].tolist()))
    other = packed(train, tokenizer, 16, seed=4, max_tokens=48).blocks
    assert len(other) == 3 and other.tolist() != trained[:3].tolist()
    held = padded_batches(documents_of(config, "calibration"), tokenizer, 16, 8, 4)
    rows = {int(row): ids for batch in held for row, ids in zip(batch["row"], batch["input_ids"].tolist())}
    assert [rows[place] for place in range(4)] == whole[-4:].tolist()


def test_paragraphs_stand_alone_and_begin_as_the_tokenizer_begins_them(folder, tokenizer):
    config = RunConfig(dataset=str(folder), lines=10, eval_docs=3)
    test = documents_of(config, "test")
    assert [text.split()[1] for text in test.texts] == ["1", "2", "3"]            # the first is too short
    begins = tokenizer("")["input_ids"]
    assert test.rows(tokenizer, 9, 2) == [[*begins, *encode(tokenizer, text)][:9] for text in test.texts[:2]]
    assert len({documents_of(config, split).hash for split in ("train", "test")}) == 2


def test_the_hub_gives_the_same_lines(folder, monkeypatch):
    asked = []

    def lines(dataset, split, remedy):
        asked.append((dataset, split))
        return ["short", *TRAINED]
    monkeypatch.setattr("dlr.base.lines.hub_lines", lines)
    assert load_lines("org/text", "train", 5).texts == TRAINED[:5]
    assert load_lines("org/text", "test", 2).texts == TRAINED[:2]
    assert asked == [("org/text", "train"), ("org/text", "validation")]


def test_too_little_text_is_refused_with_what_to_do(folder, tokenizer, tmp_path_factory):
    with pytest.raises(ValueError, match="holds 12 lines of more than 100 characters, and 13 are asked for.*fewer .lines"):
        load_lines(str(folder), "train", 13)
    with pytest.raises(ValueError, match="Ask for fewer .eval_docs"):
        load_lines(str(folder), "test", 6)
    few = load_lines(str(folder), "train", 1, 16, 99)
    for use in (lambda: few.stream(tokenizer, 0), lambda: load_lines(str(folder), "calibration", 1, 16, 99).rows(tokenizer, 16)):
        with pytest.raises(ValueError, match="99 are held out. Give more lines"):
            use()
    with pytest.raises(FileNotFoundError, match="0 files named train"):
        load_lines(str(tmp_path_factory.mktemp("empty")), "train", 1)
    (folder / "train_head.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="one JSON string a line"):
        load_lines(str(folder), "train", 2)


def test_without_lines_documents_are_read_as_before(monkeypatch):
    monkeypatch.setattr("dlr.base.lines.load_documents", lambda *given: given)
    assert documents_of(RunConfig(), "test") == ("embedded", "test")
    assert data.Documents("x", "train", ["a"], "").rows
