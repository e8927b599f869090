"""The embedded corpus, local files, packing, and the reading of foreign formats."""

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from dlr.corpus import SPLITS, _drop_repeats, content_hash, embedded_corpus, split_of
from dlr.data import Documents, PackedBlocks, folder_texts, load_documents, packed, padded_batches, token_stream
from dlr.models import NANO


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


def test_the_embedded_corpus_is_large_split_and_free_of_repeats():
    corpus = embedded_corpus()
    sizes = corpus.assign(n=corpus["text"].str.len()).groupby("split")["n"].sum()
    assert sizes.sum() > 25e6 and set(sizes.index) == set(SPLITS)
    assert (corpus["name"].map(split_of) == corpus["split"]).all() and corpus["name"].is_unique
    held = set(corpus[corpus["split"] == "test"]["text"].str.split("\n\n").explode().str.strip())
    trained = set(corpus[corpus["split"] == "train"]["text"].str.split("\n\n").explode().str.strip())
    long_shared = {p for p in held & trained if len(p) > 200}
    assert not long_shared


def test_the_hash_changes_with_any_document():
    frame = pd.DataFrame({"name": ["a", "b"], "text": ["x", "y"]})
    assert content_hash(frame) == content_hash(frame.copy())
    assert content_hash(frame) != content_hash(frame.assign(text=["x", "z"]))


def test_repeated_paragraphs_are_dropped_wherever_they_occur():
    shared, own = "same words " * 40, "other words " * 40
    frame = _drop_repeats([("a", [shared]), ("b", [f"{shared}\n\n{own}"])])
    assert frame["text"].tolist() == [shared.strip(), own.strip()]


def test_every_byte_string_round_trips(tokenizer):
    for text in ("naïve – “quotes” 12345", "def f(x):\n\treturn x  # 🙂", " leading", "مرحبا", "\x00\x01"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("2024", add_special_tokens=False)["input_ids"]) == 4


def test_packing_covers_the_stream_once_in_a_seeded_order(tokenizer):
    stream = token_stream(["one two three " * 30] * 8, tokenizer)
    blocks = PackedBlocks(stream, 32, seed=1)
    assert sorted(torch.stack([b["input_ids"] for b in blocks]).flatten().tolist()) == \
        sorted(stream[:len(blocks) * 32].tolist())
    assert torch.equal(blocks[0]["input_ids"], PackedBlocks(stream, 32, seed=1)[0]["input_ids"])
    with pytest.raises(ValueError, match="fewer than one block"):
        PackedBlocks(stream[:10], 32)


def test_padded_rows_open_with_the_end_token_and_know_their_place(tokenizer):
    documents = Documents("x", "test", ["a much longer text here " * 3, "short", "middle length text"], "")
    (batch,) = padded_batches(documents, tokenizer, 16, 8)
    assert batch["row"].tolist() == [1, 2, 0] and (batch["input_ids"][:, 0] == tokenizer.eos_token_id).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_local_files_in_the_forms_people_have(tmp_path):
    text = "words of a document " * 20
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n{"text": "%s"}\n' % (text, text))
    (tmp_path / "b.txt").write_text(f"{text}<|endoftext|>{text}")
    (tmp_path / "wiki_00").write_text(f'<doc id="1" url="" title="t">\nt\n\n{text}\n</doc>\n')
    (tmp_path / "c.md").write_text(f"# t\n\n## one\n{text}\n## two\n{text}")
    assert len(folder_texts(tmp_path)) == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty dataset"):
        folder_texts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="dataset='embedded'"):
        folder_texts(tmp_path / "none")
    with pytest.raises(ValueError, match="train, calibration"):
        load_documents("embedded", "dev")


def test_without_a_network_the_hub_answers_in_a_sentence(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("datasets.load_dataset", refused)
    with pytest.raises(ConnectionError, match="Salesforce/wikitext.*dataset='embedded'"):
        load_documents("wikitext-103-raw-v1", "test")


def test_hub_rows_become_articles_and_validation_feeds_calibration(monkeypatch):
    lines = []
    for i in range(4):
        lines += [f" = Title {i} = \n", "", " words of an article" * 30 + "\n", " = = Part = = \n", " more words\n"]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: {"text": lines})
    assert len(load_documents("wikitext-103-raw-v1", "test")) == 4
    assert len(load_documents("wikitext-103-raw-v1", "calibration")) == 2


def test_packed_stops_at_the_tokens_asked_for(tokenizer):
    documents = load_documents("embedded", "calibration")
    assert len(packed(documents, tokenizer, 64, seed=0, max_tokens=640)) == 10
