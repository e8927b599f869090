"""Token categories say of real pieces of text what a reader would."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dlr.base.models import NANO
from dlr.measure.categories import (OTHER, PARTITION, categories, frequencies, load_spacy,
                                    part_of_speech, partition, rare_ids)
from dlr.measure.record import Record, pieces

TEXT = "The `ndarray.sum` of 42 values isn't\n    documented (see Below), unfortunately: café costs 3."


def of_text(*texts) -> Record:
    """A record with tokens alone; losses rise from 0.1 in steps of 0.1."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    rows = [[0, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
    ids = torch.tensor(sum(rows, []))
    n, nan = len(ids), torch.full((len(ids),), float("nan"))
    return Record(ids=ids, document=torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)]),
                  position=torch.cat([torch.arange(len(r)) for r in rows]), gates=torch.ones(n, 4, dtype=torch.bool),
                  logits=torch.zeros(n, 4), loss_dense=torch.arange(1, n + 1) / 10, loss_routed=nan.clone(),
                  entropy_dense=nan.clone(), kl=nan.clone(), top_dense=ids[:, None].clone(),
                  top_routed=ids[:, None].clone(), top_dense_probability=nan[:, None].clone(),
                  top_routed_probability=nan[:, None].clone(), tokens=pieces(tokenizer, ids.tolist()),
                  meta={"always_keep": 2, "keep_last": 0, "keep_first_tokens": 1, "units_per_layer": 1,
                        "threshold": 0.0})


@pytest.fixture(scope="module")
def found():
    record = of_text(TEXT)
    return record, categories(record)


def members(found, name):
    record, table = found
    return [record.tokens[i].strip() for i in np.flatnonzero(table[name])]


def test_each_category_holds_what_its_name_says(found):
    record, table = found
    assert members(found, "number") == ["4", "2", "3"]
    assert {"The", "of"} <= set(members(found, "stop word")) and "values" not in members(found, "stop word")
    assert {"`", "),", ":"} <= set(members(found, "punctuation"))
    assert not any(any(c.isalnum() for c in t) for t in members(found, "punctuation"))
    assert {"The"} <= set(members(found, "capitalised")) and "of" not in members(found, "capitalised")
    assert {"values", "The"} <= set(members(found, "word start"))
    assert all(not token for token in members(found, "whitespace")) and table["whitespace"].any()
    code = "".join(members(found, "code-like"))
    assert "ndarray" in code and "values" not in code


def test_a_continuation_is_what_follows_a_letter_without_a_space(found):
    record, table = found
    for i in range(1, len(record)):
        text, before = record.tokens[i], record.tokens[i - 1] if i > 1 else ""
        if text[:1].isalpha():
            assert table["word continuation"][i] == before[-1:].isalnum()
    assert not (table["word continuation"] & table["word start"]).any()


def test_part_of_a_word_is_no_stop_word():
    record = of_text("xthe thex the")
    table = categories(record)
    assert sum(table["stop word"]) == 1 and table["stop word"].iloc[-1]


def test_the_opening_token_belongs_to_nothing_and_documents_do_not_touch():
    record = of_text("An end", "ing begins here")
    table = categories(record)
    opening = np.flatnonzero(record.position == 0)
    assert not table.iloc[opening].to_numpy().any()
    assert table["word start"][opening[1] + 1] and not table["word continuation"][opening[1] + 1]


def test_rare_goes_by_frequency_and_not_by_id():
    frequency = torch.tensor([1, 500, 2, 400, 97])
    assert rare_ids(frequency, 0.05).tolist() == [True, False, True, False, False]
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    counts = frequencies([TEXT, "the the the"], tokenizer)
    assert counts.sum() == len(tokenizer(TEXT)["input_ids"]) + len(tokenizer("the the the")["input_ids"])
    with pytest.raises(ValueError, match="cover 3 ids"):
        categories(of_text(TEXT), torch.ones(3))


def test_loss_quartiles_are_four_equal_parts_in_order(found):
    record, table = found
    each = np.column_stack([table[f"loss quartile {q}"] for q in range(1, 5)])
    assert (each[1:].sum(1) == 1).all()
    assert each[1:].sum(0).max() - each[1:].sum(0).min() <= 2
    means = [record.loss_dense.numpy()[each[:, q]].mean() for q in range(4)]
    assert means == sorted(means)


def test_the_partition_gives_each_token_one_label_that_it_has(found):
    record, table = found
    label = partition(table)
    assert len(label) == len(record)
    for i, name in enumerate(label):
        assert table[name][i] if name in PARTITION else name == OTHER


def test_parts_of_speech_follow_the_characters_and_are_optional(found, monkeypatch):
    record, _ = found

    def pipeline(text):
        start = text.index("documented")
        return [SimpleNamespace(idx=start, text="documented", pos_="VERB")]

    tags = part_of_speech(record, pipeline)
    assert "".join(t.strip() for t, tag in zip(record.tokens, tags) if tag == "VERB") == "documented"
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    assert load_spacy() is None
