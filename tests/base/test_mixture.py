"""Mixtures of domains: equal parts, groups in one split, and the five that are cut from public files."""

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest

from dlr.__main__ import main
from dlr.base import sources
from dlr.base.corpus import SPLITS, split_of
from dlr.base.data import Documents, folder_texts, load_documents, packed, padded_batches
from dlr.base.mixture import evenly


def records(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def text_of(domain: str, place: int, words: int = 40) -> str:
    return f"{domain} [{place:04d}] " + "some words " * words


@pytest.fixture
def mixture(tmp_path):
    """Three domains: two of short documents, one of which has more, and one of long ones in groups of five."""
    folder = tmp_path / "mixture"
    records(folder / "few" / "documents.jsonl", [{"text": text_of("few", i)} for i in range(300)])
    records(folder / "many" / "documents.jsonl", [{"text": text_of("many", i)} for i in range(600)])
    records(folder / "books" / "documents.jsonl",
            [{"text": text_of("books", i, 400), "group": f"book {i // 5}"} for i in range(500)])
    (folder / "SOURCES.md").write_text("# Sources\n\n" + "Nothing of this is a document. " * 20)
    return folder


def test_turns_are_taken_evenly_by_count_or_by_size():
    domains = list("aaaaabbbcc")
    order = evenly(domains)
    assert sorted(order) == list(range(10)) and [domains[i] for i in order] == list("abcabcabaa")
    assert all([i for i in order if domains[i] == name] == sorted(i for i in order if domains[i] == name) for name in "abc")
    assert evenly("aabbbbbb", [3, 3, *[1] * 6]) == [0, 2, 3, 4, 1, 5, 6, 7], "a document of a counts as three"


def test_any_first_documents_of_a_split_hold_as_many_of_each_domain(mixture, tokenizer):
    everything = []
    for split in SPLITS:
        documents = load_documents(str(mixture), split)
        assert [text.split(" ")[0] for text in documents.texts] == documents.domains, "parallel to the texts"
        least = min(Counter(documents.domains).values())
        for n in (1, 2, least, 3 * least):
            counts = Counter(documents.domains[:n])
            assert max(counts.values()) - min(counts[name] for name in ("books", "few", "many")) <= 1
        everything += documents.texts
        assert documents == load_documents(str(mixture), split), "the same each time"
    assert len(everything) == len(set(everything)) == 1400 and not any("Nothing of this" in text for text in everything)
    for batch in padded_batches(documents, tokenizer, 24, 4, limit=9):
        for ids, row in zip(batch["input_ids"], batch["row"]):
            assert documents.domains[row] + " " in tokenizer.decode(ids)


def test_a_group_falls_into_one_split_whichever_folder_it_is_read_from(mixture):
    for dataset in (mixture, mixture / "books"):
        splits = defaultdict(set)
        for split in SPLITS:
            for text in load_documents(str(dataset), split).texts:
                if place := re.match(r"books \[(\d+)\]", text):
                    splits[f"book {int(place[1]) // 5}"].add(split)
        assert len(splits) == 100 and all(split == {split_of(group)} for group, split in splits.items())
    assert load_documents(str(mixture / "books"), "test").domains == []


def test_packed_gives_every_domain_as_many_characters_however_long_its_documents(mixture, tokenizer):
    documents = load_documents(str(mixture), "train")
    blocks = packed(documents, tokenizer, 64, seed=1, max_tokens=3200)
    assert len(blocks) == 50
    parts = tokenizer.decode([i for row in blocks.blocks for i in row]).split(tokenizer.eos_token)[1:]
    characters = Counter()
    for part in parts[:-1]:
        characters[part.split(" ")[0]] += len(part)
    longest = max(map(len, documents.texts))
    assert set(characters) == {"few", "many", "books"} and max(characters.values()) - min(characters.values()) <= longest
    assert characters["few"] and Counter(part.split(" ")[0] for part in parts)["few"] > 5, "several short to one long one"
    other = packed(documents, tokenizer, 64, seed=2, max_tokens=3200)
    assert (other.blocks != blocks.blocks).any()


def test_plain_folders_are_what_they_were(tmp_path, tokenizer):
    """Sub-folders alone make no mixture: the order of names, the hash of the texts, and no domains."""
    for name in ("AA/wiki_00", "AA/wiki_01", "BB/wiki_00"):
        (tmp_path / "wiki" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wiki" / name).write_text("".join(f'<doc id="{i}">\n{text_of(name, i)}\n</doc>\n' for i in range(60)))
    texts = [text for text in folder_texts(tmp_path / "wiki") if split_of(text) == "train"]
    assert [text[:9] for text in texts] == sorted(text[:9] for text in texts)
    documents = load_documents(str(tmp_path / "wiki"), "train")
    digest = hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()[:16]
    assert documents == Documents(str(tmp_path / "wiki"), "train", texts, digest) and not documents.domains
    assert load_documents("embedded", "calibration").domains == []


def test_the_hash_knows_the_domains(mixture):
    before = load_documents(str(mixture), "test").hash
    (mixture / "many").rename(mixture / "more")                     # the same texts in the same order
    assert load_documents(str(mixture), "test").hash != before


@pytest.mark.parametrize("path, rows, words", [
    ("poems/one.txt", None, "one.txt.*belongs to none of them"), ("loose.txt", None, "loose.txt.*belongs to none of them"),
    ("few/more.jsonl", [{"text": text_of("few", 1)}], "more.jsonl.*belongs to none of them"),
    ("short/documents.jsonl", [{"text": "short"}], "short' holds no document of 200"),
    ("lone/documents.jsonl", [{"text": text_of("lone", 1)}], "test split.*holds no document of lone;.*more documents")])
def test_a_mixture_that_would_not_be_read_as_meant_is_refused(mixture, path, rows, words):
    if rows is None:
        (mixture / path).parent.mkdir(exist_ok=True)
        (mixture / path).write_text(text_of("x", 1))
    else:
        records(mixture / path, rows)
    with pytest.raises(ValueError, match=words):
        load_documents(str(mixture), "test")


def test_a_domain_for_some_texts_only_is_refused():
    with pytest.raises(ValueError, match="2 texts came with 1 domains"):
        Documents("x", "test", ["a", "b"], "", ["d"])


# -- the five domains -------------------------------------------------------------------------------------------------
SENTENCES = 'The dog ran to Mrs. Hill. "Stop!" she said. It did not stop at all.\n\n'


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A folder laid out as the public files are, each a little of its kind."""
    folder = tmp_path / "public"
    for name in ("enwiki-extract/AA", "tinystories", "gsm8k"):
        (folder / name).mkdir(parents=True)
    (folder / "enwiki-extract/AA/wiki_00").write_text("".join(
        f'<doc id="{i}" url="" title="t">\nTown {i}\n\n{SENTENCES * (30 if i % 2 else 4)}</doc>\n' for i in range(300)))
    for file, word in (("train.txt", "Once"), ("train_lowercase.txt", "once lower"), ("validation_part.txt", "Held out")):
        stories = [f"{word} {i}, there was a cat. " + "It was a good cat. " * 25 for i in range(601)]
        (folder / "tinystories" / file).write_text("\n<|endoftext|>\n".join(stories))
    (folder / "tinystories" / "again.txt").write_text((folder / "tinystories" / "train.txt").read_text())
    records(folder / "gsm8k" / "train.jsonl", [{"question": f"How many are {i} and 2? ", "answer":
            f"There are {i}+2=<<{i}+2={i + 2}>>{i + 2}. " + "So it is. " * 5 + f"\n#### {i + 2}"} for i in range(803)])
    for i in range(90):
        path = folder / "classic-books-children" / f"Author {i % 9}" / f"Book {i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Title: Book {i}\n\n-------\n\n## I\n\n" + "".join(f"[{i} {n}] {SENTENCES}" for n in range(300)))
    (folder / "classic-books-children" / "README.md").write_text("Not a book. " * 300)
    for i in range(90):
        (tmp_path / f"module{i}.py").write_text("".join(f"def f{i}_{n}(x):\n    return x + {n}\n\n\n" for n in range(200)))
    files = [(f"python:m{i}.py", str(tmp_path / f"module{i}.py")) for i in range(90)]
    (tmp_path / "cp1250.py").write_text("# not this table\n" * 300)
    files.append(("python:encodings/cp1250.py", str(tmp_path / "cp1250.py")))
    monkeypatch.setattr(sources, "source_files", lambda packages: files)
    return folder


def test_the_command_cuts_five_domains_whose_splits_are_read_back_as_they_were_counted(public, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["mixture", str(public), str(out), "--per-domain", "100"]) == 0
    shown = capsys.readouterr().out
    named = {"encyclopaedia", "mathematics", "novels", "python", "stories"}
    assert {path.name for path in out.iterdir()} == named | {"SOURCES.md"} and all(name in shown for name in named)
    notes = (out / "SOURCES.md").read_text()
    assert all(licence in notes for licence in ("CC BY-SA 3.0", "MIT", "public domain", "PSF-2.0", "CDLA-Sharing-1.0"))
    counts = {split: Counter(load_documents(str(out), split).domains) for split in SPLITS}
    for name in named:
        cells = [int(cell) for cell in re.search(rf"(?m)^{name} +(\d+) +(\d+) +(\d+) +(\d+)$", shown).groups()]
        assert cells == [counts[split][name] for split in SPLITS] and cells[0] > 70 and min(cells) >= 1
    assert all(counts["train"][name] == 90 and counts["test"][name] == 4 for name in ("novels", "python", "mathematics"))
    texts = "\n".join(text for split in SPLITS for text in load_documents(str(out), split).texts)
    assert "Town 1\n" in texts and not re.search("Town 2\n", texts), "articles of over 1,500 characters"
    assert "Once" in texts and "once lower" not in texts and "Held out" not in texts and "Once 600," not in texts
    assert max(Counter(re.findall(r"Once \d+,", texts)).values()) == 1, "a story of two files is taken once"
    assert "<<" not in texts and "#### 7" in texts and "Not a book" not in texts and "# not this table" not in texts
    assert max(Counter(re.findall(r"\[\d+ \d+\]", texts)).values()) == 1, "pieces do not overlap"


def test_pieces_of_a_book_or_a_source_file_fall_into_one_split(public, tmp_path):
    table = sources.write_mixture(public, tmp_path / "out", 300)
    splits = defaultdict(set)
    for split in SPLITS:
        for text in load_documents(str(tmp_path / "out"), split).texts:
            for book in re.findall(r"\[(\d+) \d+\]|def f(\d+)_", text):
                splits[book].add(split)
    assert len(splits) == 180 and all(len(found) == 1 for found in splits.values())
    assert table.loc["novels"].tolist() == [270, 9, 9, 12], "held-out splits take more of each of their few books"


def test_pieces_follow_on_one_another_and_end_where_sentences_do():
    text = SENTENCES * 200
    cut = sources.pieces(text, sources._PROSE)
    assert text.startswith("".join(cut)) and len("".join(cut)) > len(text) - 1800 and len(cut) > 5
    assert all(1800 <= len(piece) < 1900 and piece.rstrip().endswith(('l.', '!"', 'd.', 'll.')) for piece in cut)
    assert not any(piece.rstrip().endswith("Mrs.") for piece in cut) and sources.pieces("no end " * 900, sources._PROSE) == []


def test_groups_take_turns_and_give_from_all_over_themselves():
    groups = {f"g{i}": [f"g{i} {n}" for n in range(60)] for i in range(80)}
    documents = sources.chosen(groups, 2000)
    assert len(documents) == len(set(documents)) == 2000
    by_split = {split: [pair for pair in documents if split_of(pair[0]) == split] for split in SPLITS}
    assert [len(part) for part in by_split.values()] == [1800, 60, 60, 80]
    for part in by_split.values():
        held = {key for key, _ in part}
        assert {key for key, _ in part[:len(held)]} == held, "each once before any twice"
        places = [int(text.split()[1]) for key, text in part if key == part[0][0]]
        assert places == sorted(places) and places[0] < 30 < places[-1], "not from the beginning alone"


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(public, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*words, data=public, count="100"):
        assert main(["mixture", str(data), str(out), "--per-domain", count]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert all(word in error for word in words), error
        assert not list(tmp_path.glob(".out*"))

    refused("--per-domain 24 must be 25 or more", count="24")
    (public / "gsm8k" / "train.jsonl").write_text('{"text": "x"}\n')
    refused("mathematics cannot be cut", "'question'")
    (public / "gsm8k" / "train.jsonl").unlink()
    refused("no gsm8k/train.jsonl", "mathematics", "Put it there")
    refused("no enwiki-extract", data=tmp_path / "nowhere")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    refused("is there already")
    assert (out / "mine.txt").read_text() == "kept"


def test_too_few_groups_for_a_split_are_refused():
    with pytest.raises(ValueError, match="none of 2 groups.*calibration split"):
        sources.chosen({"a": ["x"], "b": ["y"]}, 100)
