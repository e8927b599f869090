"""The embedded corpus, local files, packing, and the reading of foreign formats."""

import json
import re

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from dlr.base.corpus import SPLITS, _drop_repeats, content_hash, embedded_corpus, split_of
from dlr.base.data import (Documents, PackedBlocks, folder_texts, load_documents, packed,
                           padded_batches, token_stream)
from dlr.base.encoding import encode
from dlr.base.models import NANO


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
    for text in ("naïve – “quotes” 12345", "def f(x):\n\treturn x  # 🙂", " leading", "مرحبا", "\x00\x01",
                 "The marker <|endoftext|> and <|pad|> in a manual.", "<|endoftext|>", "<|endoftext|><|endoftext|> <|pad|>"):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text and not {0, 1} & set(ids)
    assert len(encode(tokenizer, "2024")) == 4 and encode(tokenizer, []) == [] and encode(tokenizer, ["", "a"])[0] == []


def test_every_document_of_the_corpus_has_one_opening_token(tokenizer):
    """Some of them, docstrings of tokenizers, spell special tokens out."""
    texts = embedded_corpus()["text"]
    texts = texts[texts.str.contains("<|endoftext|>", regex=False) | texts.str.contains("<|pad|>", regex=False)].tolist()
    assert len(texts) >= 8
    stream = token_stream(texts, tokenizer)
    assert (stream == tokenizer.eos_token_id).sum() == len(texts) and (stream == tokenizer.pad_token_id).sum() == 0
    for batch in padded_batches(Documents("x", "train", texts, ""), tokenizer, 4096, 4):
        assert (((batch["input_ids"] < 2) & batch["attention_mask"].bool()).sum(1) == 1).all()


def _fast(model, special: list[str], **named):
    bare = Tokenizer(model)
    if isinstance(model, models.Unigram):
        bare.normalizer, bare.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    if isinstance(model, models.WordLevel):
        bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=bare, **named)


class _Characters(PreTrainedTokenizer):
    """A tokenizer in Python; with `deaf` it does not heed the request to split special tokens."""

    def __init__(self, deaf: bool = False, **named):
        self.pieces, self.deaf = ["<s>", "<unk>", *"ab <>s"], deaf
        super().__init__(bos_token="<s>", unk_token="<unk>", **named)

    vocab_size = property(lambda self: len(self.pieces))

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def _tokenize(self, text, **options):
        return re.findall("<s>|.", text) if self.deaf else list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index):
        return self.pieces[index]


def test_tokenizers_that_hold_special_tokens_among_their_words_keep_text_as_text_too():
    """Unigram (SentencePiece), BPE with such merges, and word-level models spell special tokens even when asked to split."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "▁<s>/aunk")]
    unigram = _fast(models.Unigram(pieces, unk_id=0), ["<s>", "</s>", "<unk>"], bos_token="<s>", eos_token="</s>",
                    unk_token="<unk>")
    for text in ("a <s> a</s>", "<unk> a"):
        assert unigram.decode(encode(unigram, text)) == text and not {0, 1, 2} & set(encode(unigram, text))
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "<", "s", ">", "s>", "a"])}
    bpe = _fast(models.BPE(words, [("s", ">"), ("<", "s>")], unk_token="<unk>"), ["<s>", "<unk>"], bos_token="<s>",
                unk_token="<unk>")
    assert bpe.convert_ids_to_tokens(encode(bpe, "a<s>a")) == ["a", "<", "s>", "a"]
    level = _fast(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "a": 2}, unk_token="[UNK]"), ["[EOS]", "[UNK]"],
                  eos_token="[EOS]", unk_token="[UNK]")
    assert encode(level, ["a [EOS] a b", "a"]) == [[2, 0, 2, 0], [2]]
    assert encode(_Characters(), "a<s>b") == [2, 5, 7, 6, 3]
    with pytest.raises(ValueError, match="reads special tokens out of ordinary text.*fast tokenizer"):
        encode(_Characters(deaf=True), "a<s>b")


def test_a_tokenizer_without_ends_is_refused_in_a_sentence():
    plain = _fast(models.WordLevel({"a": 0, "b": 1, "u": 2}, unk_token="u"), [])
    documents = Documents("x", "test", ["a b", "a"], "")
    for made in (lambda: token_stream(["a b"], plain), lambda: padded_batches(documents, plain, 8, 2)):
        with pytest.raises(ValueError, match="neither a beginning-of-text nor an end-of-text.*set tokenizer.bos_token"):
            made()
    plain.add_special_tokens({"bos_token": "<s>"})
    (batch,) = padded_batches(documents, plain, 8, 2)
    assert (batch["input_ids"][:, 0] == 3).all() and batch["input_ids"].shape == (2, 3)


def test_a_stream_holds_any_id_and_is_made_anew_for_other_text_or_rules(tmp_path, monkeypatch):
    from dlr.base import encoding, pretrain

    class Large:
        bos_token_id, eos_token_id = 70_000, None

        def __call__(self, texts, **options):
            return {"input_ids": [[65_536 + len(text), 151_935] for text in texts]}

    def stream(texts):
        monkeypatch.setattr(pretrain, "pretraining_texts", lambda *arguments, **options: texts)
        return pretrain.pretraining_stream("", Large(), tmp_path / "stream.npy")

    assert stream(["abc"]).tolist() == [70_000, 65_539, 151_935]
    (first,) = tmp_path.glob("*.npy")
    modified = first.stat().st_mtime_ns
    assert stream(["abc"]).tolist() == [70_000, 65_539, 151_935] and first.stat().st_mtime_ns == modified, "kept"
    assert stream(["abcd"]).tolist() == [70_000, 65_540, 151_935]
    monkeypatch.setattr(encoding, "RULES", encoding.RULES + 1)
    stream(["abc"])
    assert len(list(tmp_path.glob("*.npy"))) == 3
    monkeypatch.setattr(Large, "bos_token_id", -1)
    with pytest.raises(OverflowError):
        stream(["abc"])


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
    (tmp_path / "b.txt").write_text(f"{text}\n<|endoftext|>\n{text}\n<|endoftext|>\n")
    (tmp_path / "glued.txt").write_text(f"{text}<|endoftext|>{text}")
    (tmp_path / "manual.txt").write_text(f"{text}\nThe marker <|endoftext|> ends a `<|endoftext|>`.\n{text}")
    (tmp_path / "wiki_00").write_text(f'<doc id="1" url="" title="t">\nt\n\n{text}\n</doc>\n')
    (tmp_path / "c.md").write_text(f"# t\n\n## one\n{text}\n## two\n{text}")
    assert len(folder_texts(tmp_path)) == 10
    (manual,) = folder_texts(tmp_path / "manual.txt")
    assert manual.count("<|endoftext|>") == 2, "a text that speaks of the marker is one text"
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


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", ("caf\xe9 " * 100).encode("latin-1"), "not UTF-8 .byte 3"), ("a.txt", ("word " * 100).encode("utf-16"), "not UTF-8"),
    ("a.json", b'{"data": ["x"]}', "list of texts"), ("a.json", b"[1", "not valid JSON"),
    ("a.jsonl", b'{"text": {"en": "x"}}\n', "record 0"), ("a.jsonl", b'{"text": "x"}\n{"content": "x"}\n', "record 1"),
    ("a.json", b'[["x", "y"]]', "record 0")])
def test_files_that_cannot_be_read_as_meant_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        folder_texts(tmp_path)


def test_a_byte_order_mark_and_line_ends_are_no_text(tmp_path):
    text = "a line of text\r\n" * 20
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one\u2028two " * 30}, ensure_ascii=False) + "\n", encoding="utf-8")
    plain, record = folder_texts(tmp_path)
    assert plain == text.replace("\r\n", "\n").strip() and "\u2028" in record


def test_bytes_that_are_no_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no UTF-8"):
        encode(tokenizer, "caf\udce9")
