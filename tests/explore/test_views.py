"""Views: what they show is what the record holds, any text stays text, and every colour can be read."""

import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from tiny_models import half_skipping

from dlr.explore import html as views
from dlr.explore import terminal, tokens
from dlr.explore.export import cell, export, rows, to_csv, to_json
from dlr.explore.html import agreement, comparison, differing, link, page, stream, stylesheet
from dlr.explore.layout import Cost, Layout, Look, level
from dlr.explore.session import Session
from dlr.explore.stream import Progress, Side
from dlr.explore.style import LEVELS, contrast, ink, ramp
from dlr.explore.tokens import Shown, piece_bytes, shown, spans, visible
from dlr.measure.record import Record, pieces
from dlr.routing.config import RouterConfig

HOSTILE = ["<script>alert(1)</script>", "&lt;b&gt; &amp;amp;", "\"double\" 'single' `back`", "a\nb\n\nc", "tab\there",
           "    leading and trailing   ", "\N{GRINNING FACE}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
           "\N{RIGHT-TO-LEFT MARK}שלום\N{RIGHT-TO-LEFT OVERRIDE} x", "the the the the", "日本語 ñ é", "\x1b[31mred\x07",
           "</div></span></style>", "<|endoftext|>", "\N{REPLACEMENT CHARACTER}", "$x_1$ \\frac"]


class Page(HTMLParser):
    """The tags of a page, and whether every opened one that needs it is closed in order."""
    VOID = {"br", "meta", "rect", "path"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.attributes, self.text = [], [], [], ""
        self.feed(str(text))                # a piece of Markup added to text would escape it

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def session(model, tokenizer):                                  # noqa: F811
    half_skipping(model, RouterConfig(always_keep=2))
    return Session(model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("text", [*HOSTILE, "", " ", " ".join(HOSTILE)])
def test_any_text_stays_text_in_every_view(session, text):
    found = session.read(text)
    for made in (views.view(found, session.flops(found)), page(views.view(found)),
                 comparison(found, session.static(found)[0], ("<b>one</b>", "two & three"))):
        seen = Page(made)
        assert not seen.open
        assert not {"script", "img", "iframe", "object"} & set(seen.tags)
        assert not [name for name, _ in seen.attributes if name.startswith("on")]
        assert not re.search(r"https?://|url\(|@import", made)
        for token in shown(found):
            assert token.text.strip() in seen.text
    plain = terminal.view(found, colour=True)
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", plain) and "\x07" not in plain


def test_no_template_can_let_a_text_through():
    for path in views.FOLDER.rglob("*.*"):
        assert not re.search(r"\|\s*safe|autoescape", path.read_text(encoding="utf-8")), path.name
    assert views.render("message.html", text="<b>").count("&lt;b&gt;") == 1


ATTACK = "\"'><img src=x onerror=alert(1)><script>alert(1)</script></style></textarea>&lt;i&gt;"


def test_hostile_words_in_every_field_stay_text(session, monkeypatch, tmp_path):
    """Token, prediction, note, category, model, policy, execution, names, notes, titles, prompts, errors and file names."""
    found = session.read("two words")
    hostile = {key: ATTACK for key in found.meta["top_tokens"]}
    found = replace(found, tokens=[ATTACK] * len(found), meta=found.meta | {
        "model": ATTACK, "policy": ATTACK, "top_tokens": hostile, "text": ATTACK, "text_hash": ATTACK})
    monkeypatch.setattr(tokens, "kinds", lambda record: [ATTACK] * len(record))
    monkeypatch.setattr(tokens, "shown", lambda record: [Shown(ATTACK, ATTACK, ATTACK)] * len(record))
    cost = Cost(2.0, 1.0, 1.0, 1.0, 1.0, execution=ATTACK)
    side = Side([5, 6], [ATTACK, ATTACK], [3.0])
    progress = Progress(ATTACK, side, side, 6, ATTACK, {"5": ATTACK})
    path = tmp_path / (ATTACK.replace("/", "") + ".html")
    path.write_text("x")
    made = {"view": views.view(found, cost, note=ATTACK), "strip": views.strip(Layout(found), cards=False),
            "comparison": comparison(found, found, (ATTACK, ATTACK), (cost, cost), note=ATTACK),
            "error": views.message(ValueError(ATTACK)), "said": views.message(ATTACK),
            "stream": stream(progress, 2.0), "page": page("", ATTACK),
            "link": link(path), "saved": views.saved([path])}
    for name, markup in made.items():
        seen = Page(markup)
        assert not seen.open, name
        assert not {"script", "img", "textarea", "i"} & set(seen.tags) - ({"i"} if name in ("view", "strip", "comparison",
                                                                                          "stream") else set()), name
        assert not [key for key, _ in seen.attributes if key.startswith("on")], name
        assert markup.count("</style>") == ("<style>" in markup), name
        if name not in ("page", "link", "saved"):
            assert "onerror=alert(1)" in seen.text or "⟨" in seen.text, name


def test_what_the_view_shows_is_what_the_saved_record_holds(session, tmp_path):
    found = session.read(" ".join(HOSTILE[:6]))
    saved = Record.load(found.save(tmp_path / "text"))
    seen = views.view(saved, session.flops(saved))
    assert seen == views.view(found, session.flops(found))
    depths = [float(d) for d in re.findall(r'data-depth="([\d.]+)"', seen)]
    assert depths == saved.active_layers.tolist()
    assert f"{100 * saved.skip_ratio:.1f} %" in seen and f"{saved.perplexity():,.2f} / {saved.perplexity('dense'):,.2f}" in seen
    cards = seen.split("<span class=dlr-card")[1:]
    for i, card in enumerate(cards[:-1]):
        assert f"dense {float(saved.loss_dense[i]):.3f} · routed {float(saved.loss_routed[i]):.3f} nats" in card
        assert f"{float(saved.kl[i]):.3f} nats, dense to routed" in card
        assert f"id {int(saved.ids[i])} · position {i} · " in card
        for which in ("dense", "routed"):
            for chance in getattr(saved, f"top_{which}_probability")[i].tolist():
                assert f"{100 * chance:.1f} %" in card
    for i, row in enumerate(rows(saved)):
        assert row["active_layers"] == sum(row["layers"]) == float(saved.active_layers[i])
    assert '"tokens"' in to_json(saved) and "NaN" not in to_json(saved)


def test_the_heatmap_draws_every_gate_once(session):
    found = session.read("some words to cut into pieces")
    columns = re.findall(r'(?s)<div class="dlr-c [^"]*" title="([^"]*)">.*?</svg><b>([\d.]+)</b>', views.heatmap(Layout(found)))
    assert len(columns) == len(found)
    for i, (hint, total) in enumerate(columns):
        missing = [2 + u for u, gate in enumerate(found.gates[i].tolist()) if not gate]
        assert html.unescape(hint).endswith(f"skipped {spans(missing)}")
        assert float(total) == float(found.active_layers[i])
    drawn = re.findall(r"M0 (\d+)h1", views.heatmap(Layout(found)))
    assert len(drawn) == int(found.active_layers.sum())


def test_a_layer_range_counts_and_shows_only_its_layers(session):
    found = session.read("some words to cut into pieces")
    look = Look(3, 4)
    assert Layout(found, look).depths == found.gates[:, 1:3].sum(1).tolist()
    assert 'viewBox="0 0 1 2"' in views.heatmap(Layout(found, look))
    total = sum(torch.tensor(Layout(found, Look(i, i)).depths) for i in range(6))
    assert torch.equal(total, found.active_layers)


def test_sublayer_records_show_halves(model, tokenizer):         # noqa: F811
    half_skipping(model, RouterConfig(always_keep=2, unit="sublayer"))
    found = Session(model=model, tokenizer=tokenizer).read("halves of layers")
    assert Layout(found).depths == found.active_layers.tolist()
    assert any("h1v0.45" in part for part in views.heatmap(Layout(found)).split("<path"))


def test_sentencepiece_words_keep_their_spaces_and_bytes_are_spelled():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "</s>", "\u2581", "\u2581the", "\u2581cat", "s", "<0xF0>", "<0x9F>"]
    bare = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    bare.normalizer = normalizers.Replace(" ", "\u2581")
    bare.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    assert pieces(tokenizer, [3, 4, 5, 2]) == [" the", " cat", "s", " "]
    assert piece_bytes(tokenizer, [3, 6, 7]) == {"6": "F0", "7": "9F"}
    tokenizer.convert_ids_to_tokens = lambda i: "<0x<b>>"
    assert bytes.fromhex(piece_bytes(tokenizer, [6])["6"]) == b"<0x<b>>", "a piece that only looks like a byte is none"


def test_bytes_of_a_split_character_are_spelled_and_joined(session):
    found = session.read("x\N{GRINNING FACE}y")
    tokens = shown(found)
    split = [t for t in tokens if t.note]
    assert len(split) > 1 and all("\N{GRINNING FACE}" in t.note for t in split)
    spelled = bytes.fromhex("".join(re.search(r"⟨([0-9A-F ]+)⟩", t.text)[1].replace(" ", "") for t in split))
    assert spelled.decode() == "\N{GRINNING FACE}"


def test_every_shade_can_be_read_and_order_is_kept():
    for dark in (False, True):
        colours = ramp(dark)
        assert len(set(colours)) == LEVELS
        assert all(contrast(c, ink(c)) >= 4.5 for c in colours)
    assert "@media (prefers-color-scheme:dark)" in stylesheet() and 'data-jp-theme-light=false' in stylesheet()
    levels = [level(d, 4, 16) for d in range(4, 17)]
    assert levels == sorted(set(levels)) and levels[0] == 0 and levels[-1] == LEVELS - 1


def test_tokens_can_be_reached_by_keyboard_and_are_described(session):
    found = session.read("reach me")
    strip = views.strip(Layout(found))
    assert strip.count("tabindex=0") == strip.count("aria-label=") == len(found)


def test_the_difference_of_two_plans_is_marked(session):
    first = session.read("two plans for the same text")
    assert not differing(Layout(first), Layout(first))
    assert agreement(Layout(first), Layout(first)) == 1.0
    second = session.at_skip(first, 0.0)
    changed = {i for i in range(len(first)) if not first.gates[i].all()}
    assert differing(Layout(first), Layout(second)) == changed
    made = comparison(first, second, ("one", "two"))
    assert made.count("dlr-x") - stylesheet().count("dlr-x") == 2 * len(changed)
    assert "not subtracted" in comparison(first, session.read("another text"), ("one", "two"))


def test_the_page_is_the_view_and_files_appear_whole(session, tmp_path):
    found = session.read(" ".join(HOSTILE))
    seen = views.view(found)
    made = {p.suffix: p for p in export(found, seen, tmp_path / "out")}
    assert seen in made[".html"].read_text(encoding="utf-8")
    assert made[".png"].read_bytes().startswith(b"\x89PNG") and made[".pdf"].read_bytes().startswith(b"%PDF")
    assert not list((tmp_path / "out").glob(".*"))
    with pytest.raises(ValueError, match="html, png"):
        export(found, seen, tmp_path, formats=("docx",))


def test_a_spreadsheet_runs_no_token_and_numbers_stay_numbers(session):
    found = session.read("a b c d e f g h")
    risky = ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\"=1", "'=1", "＝1", "\x00=1", "\u200e=1",
             "\xa0\u2060+1", "﹦1", "﹣1"]
    found = replace(found, tokens=(risky * len(found))[:len(found)],
                    meta=found.meta | {"top_tokens": {key: "=cmd|' /C calc'!A0" for key in found.meta["top_tokens"]}})
    table = pd.read_csv(io.StringIO(to_csv(found)), keep_default_na=False)
    for name in ("token", "shown", "note", "category", *(f"top_{which}_{k}" for which in ("dense", "routed")
                                                         for k in range(5))):
        for value in table[name].astype(str):
            assert not re.match(r"[\s\"]*[=+\-@＝＋－＠]|[\t\r\n]", value), (name, value)
    for text in risky:
        assert cell(text) == f"'{text}"
    assert [cell(value) for value in (-1.5, -3, None, "a-b", "x=1", "·a", "")] == [-1.5, -3, None, "a-b", "x=1", "·a", ""]
    assert '"a;=1"' in to_csv(replace(found, tokens=["a;=1"] * len(found))), "';' separates cells in many countries"
    logits = pd.read_csv(io.StringIO(to_csv(found)))["logit_0"]
    assert logits.dtype == float and (logits < 0).any()
    assert [row["token"] for row in json.loads(to_json(found))["tokens"]] == found.tokens, "JSON is exact"


def test_invisible_characters_get_signs_and_widths():
    for odd in "\x1b\x9b\x9d\x07\x85\u202e\u2066\u200b\u2028\ufeff\U000e0041\u3164\u2800\xad":
        assert visible(odd) == f"‹{ord(odd):04X}›", "control, direction, blank: shown as what it is"
    assert visible(" a\tb\n\x1b") == "·a⇥b↵‹001B›" and visible("a b", spaces=False) == "a b"
    for text, columns in (("abcd", 4), ("日本", 4), ("abce\N{COMBINING ACUTE ACCENT}", 4), ("a", 3)):
        assert Shown(text, text).columns == columns
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8" and spans([]) == "none"


def test_the_terminal_shows_the_same_numbers(session):
    found = session.read("in the terminal")
    layout = Layout(found)
    plain = terminal.strip(layout, colour=False).translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
    expected = "".join(f"{t.text}{d:g}" for t, d in zip(shown(found), found.active_layers.tolist()))
    assert plain == expected
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.strip(layout)) == terminal.strip(layout, colour=False)
