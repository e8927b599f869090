"""The explorer: what is on screen is the record, odd tokens are text, errors are said, models are given back."""

import json
import re
import shutil
import time
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import SMALL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dlr
from dlr.base.encoding import encode
from dlr.base.find import find_checkpoint
from dlr.base.models import NANO
from dlr.explore import html as views
from dlr.explore.layout import Layout, grid
from dlr.explore.session import Session
from dlr.explore.tabs import STATIC, Comparison, Generator
from dlr.explore.widgets import Explorer
from dlr.routing.budget import calibration_curve
from dlr.routing.config import RouterConfig

HOSTILE = ["<script>alert('x')</script>", "&lt;b&gt; &amp;", "\"double\" 'single'", "a\nb\tc\r", "   leading", "naïve 日本語",
           "\N{FAMILY}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}", "\N{RIGHT-TO-LEFT MARK}שלום\N{LEFT-TO-RIGHT MARK}",
           "twice twice twice", "</style><img src=x onerror=alert(1)>", "$x^2$ [[0m \x1b[31m", ""]


def small_session(seed=0):
    """A tiny model with the embedded tokenizer and a calibrated router whose logits are spread."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 4096, "max_position_embeddings": 1024})).eval()
    routing = dlr.attach(model, RouterConfig(always_keep=2))
    with torch.no_grad():
        routing.router.net[-1].weight.normal_(std=2.0)
        routing.router.net[-1].bias.zero_()
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    session = Session(model=model, tokenizer=tokenizer)
    routing.calibration.skip, routing.calibration.threshold = 0.4, 0.0
    logits = session.read("Some words to calibrate on, and a few more of them. " * 5).logits
    routing.calibration.curve = session._curve = calibration_curve(logits)
    routing.calibration.threshold = routing.calibration.curve[40]
    return session


@pytest.fixture(scope="module")
def session():
    return small_session()


@pytest.fixture
def explorer(session):
    return Explorer(session=session, text="A first text, of some words.")


def numbers(html: str) -> list[float]:
    return [float(depth) for depth in re.findall(r'data-depth="([\d.]+)"', html)]


def test_the_numbers_on_screen_are_those_of_the_record(explorer):
    record = explorer.record
    assert numbers(explorer.view.value) == record.active_layers.tolist()
    assert f"{100 * record.skip_ratio:.1f} %" in explorer.view.value
    assert f"{record.perplexity():,.2f} / {record.perplexity('dense'):,.2f}" in explorer.view.value
    explorer.layers.value = (2, 4)
    assert numbers(explorer.view.value) == grid(record)[:, 2:5].sum(1).tolist()


@pytest.mark.parametrize("text", HOSTILE)
def test_odd_text_shows_as_text(explorer, text):
    explorer.text.value = text
    html = explorer.view.value
    assert explorer.error is None
    assert len(numbers(html)) == len(explorer.record) == 1 + len(encode(explorer.session.tokenizer, text))
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert html.count("</style>") == 1
    assert "\N{RIGHT-TO-LEFT MARK}" not in html and "\N{ZERO WIDTH JOINER}" not in html, "marks are spelled out"
    if "日" in text:
        assert "⟨" in html and "tokens" in html, "pieces of a character say what they join to"


def test_a_text_longer_than_the_context_is_cut_and_says_so(explorer):
    explorer.text.value = "word " * 1500
    assert len(explorer.record) == 1024 and "Cut to 1,024 of" in explorer.view.value


def test_the_slider_reroutes_without_the_model_and_settles_with_it(explorer, monkeypatch):
    calls, settled = [], []
    handle = explorer.session.model.register_forward_pre_hook(lambda *a: calls.append(1))
    monkeypatch.setattr(explorer, "_settle_later", lambda: settled.append(1))
    ratios = []
    for budget in (0, 20, 60, 80):
        explorer.budget.value = budget
        ratios.append(explorer.record.skip_ratio)
    assert not calls and len(settled) == 4
    assert ratios == sorted(ratios) and ratios[0] == 0.0 < ratios[-1]
    assert "recomputing" in explorer.view.value
    gates = explorer.record.gates
    explorer.settle()
    assert calls and torch.equal(explorer.record.gates, gates) and "recomputing" not in explorer.view.value
    handle.remove()


def test_an_error_is_said_and_the_next_input_works(explorer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(explorer.session, "read", broken)
    explorer.text.value = "anything"
    assert "RuntimeError: out of &lt;memory&gt;" in explorer.view.value
    assert explorer.export() == [] and "nothing to export" in explorer.downloads.value
    monkeypatch.undo()
    explorer.text.value = "anything else"
    assert explorer.error is None and numbers(explorer.view.value) == explorer.record.active_layers.tolist()


def test_exports_hold_the_live_view_and_reach_for_nothing(explorer, tmp_path):
    files = {path.suffix: path for path in explorer.export(tmp_path)}
    assert set(files) == {".html", ".png", ".pdf", ".csv", ".json"}
    page = files[".html"].read_text(encoding="utf-8")
    assert explorer.view.value in page
    assert not re.search(r"<script|https?://|@import|url\(", page)
    saved = json.loads(files[".json"].read_text(encoding="utf-8"))
    assert str(explorer.record.meta["threshold"]) in json.dumps(saved)
    assert files[".csv"].read_text(encoding="utf-8").count("\n") >= len(explorer.record)


def test_two_explorers_do_not_disturb_each_other_and_close_gives_the_base_back():
    ids = torch.arange(2, 40).unsqueeze(0)
    first, second = Explorer(text="one"), Explorer(text="two")
    assert first.session.model is not second.session.model
    first.budget.value = 70
    assert second.record.skip_ratio == pytest.approx(second.session.read("two").skip_ratio)
    from dlr.base.models import load_base
    expected = load_base()[0](ids).logits
    for explorer in (first, second):
        model = explorer.session.model
        base = explorer.session.close()
        assert torch.equal(base(ids).logits, expected)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules()), type(model)


def test_after_an_error_no_other_text_is_shown_or_exported(explorer, monkeypatch):
    monkeypatch.setattr(explorer.session.model, "forward", lambda *a, **k: 1 / 0)
    explorer.text.value = "A second text."
    for widget, value in ((explorer.layers, (1, 3)), (explorer.budget, 55), (explorer.shade, False)):
        widget.value = value
        assert "ZeroDivisionError" in explorer.view.value and not numbers(explorer.view.value)
    assert explorer.export() == []
    monkeypatch.undo()
    explorer.budget.value = 30
    assert explorer.error is None and explorer.record.meta["text"] == "A second text."


def test_an_export_waits_for_what_is_pending(explorer, tmp_path):
    explorer._settle_later.action = explorer._read_later.action = lambda: None
    explorer.budget.value = 70
    assert explorer.record.loss_routed.isnan().all()
    explorer.export(tmp_path / "a")
    assert "recomputing" not in (tmp_path / "a" / "tokens.html").read_text(encoding="utf-8")
    explorer.text.value = "A text typed a moment ago."
    explorer.export(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokens.json").read_text(encoding="utf-8"))["meta"]["text"] == explorer.text.value


def test_a_checkpoint_that_does_not_load_leaves_the_one_that_is_there(tmp_path):
    explorer = Explorer(text="Some text.")
    there = explorer.picker.value
    explorer._sources["broken"] = (tmp_path, None)
    explorer.picker.options = list(explorer._sources)
    explorer.picker.value = "broken"
    assert explorer.error is not None and explorer.picker.value == there and explorer.session.name == there
    explorer.budget.value = 60
    assert explorer.error is None and explorer.record.meta["model"] == there
    explorer.close()


def test_a_static_plan_has_the_first_sides_skip(session):
    found = session.read("Some text with a number of words in it, to have several tokens.")
    for skip in (0.0, 0.25, 0.5, 1.0):
        plan, _ = session.static(found, skip)
        assert abs(plan.skip_ratio - skip) <= 0.5 / session.routing.units + 1e-6 + (1 / len(found) if skip else 0)


def test_comparison_marks_the_tokens_that_differ(session):
    both = Comparison(session=session, text="Words to compare, one by one.")
    both.budgets["first"].value, both.budgets["second"].value = 60, 10
    first, second = both.records
    assert first.skip_ratio > second.skip_ratio
    assert both.error is None and "dlr-x" in both.view.value
    both.plan.value = STATIC
    free = both.records[1].gates[1:]
    assert (free == free[:1]).all(), "a static plan is the same for every token"


def test_generation_shows_each_tokens_depth_and_can_be_stopped(session):
    tab = Generator(session=session, prompt="The value")
    tab.tokens.value, tab.temperature.value = 6, 0.0
    tab.run()
    assert tab.error is None and tab.progress.done
    assert tab.start.disabled is False and "tokens/s" in tab.view.value
    draw = tab._draw
    tab._draw = lambda progress: (draw(progress), tab.halt())
    tab.tokens.value = 50
    tab.run()
    assert tab.progress.stopped and len(tab.progress.routed.ids) == 1 and "stopped" in tab.view.value


def test_an_unknown_checkpoint_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nowhere'.*embedded router"):
        find_checkpoint("nowhere")


def test_a_router_without_a_curve_says_where_its_thresholds_come_from():
    session = small_session()
    session._curve = []
    found = session.at_skip(session.read("Some text without a curve."), 0.5)
    assert abs(found.skip_ratio - 0.5) < 0.3 and "no stored calibration curve" in session.note
    explorer = Explorer(session=session, text="Some text.")
    explorer.budget.value = 35
    assert "no stored calibration curve" in explorer.view.value
    session.routing.calibration.skip = None
    assert abs(session.threshold(session.calibrated) - session.routing.calibration.threshold) < 0.2, "opens where it was left"


def test_views_need_no_model(session):
    record = session.read("Just a record.")
    half = replace(record, gates=torch.zeros_like(record.gates))
    assert numbers(views.strip(Layout(half))) == [2.0] * len(half)
    assert views.heatmap(Layout(half)).count("dlr-c ") == len(half)


def _other_checkpoint(folder):
    """A routed model whose base has a vocabulary of its own, of 60 words; returns the checkpoint's folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(58)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(folder / "base")
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 60})).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    dlr.attach(model, RouterConfig(always_keep=2))
    return dlr.save_pretrained(model, folder / "checkpoint")


def test_a_checkpoint_is_read_by_its_own_tokenizer(tmp_path, monkeypatch):
    """That of its base, or the one in its folder; a recorded plan as well as the explorer. Paths are the caller's."""
    from dlr.measure.shapes import recorded_logits
    checkpoint = _other_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    session = Session("checkpoint")
    assert session.read("w3 w4 unheard").ids.tolist() == [0, 5, 6, 1]
    assert recorded_logits("checkpoint", 2)[0].shape[1] == 4
    own = AutoTokenizer.from_pretrained(tmp_path / "base")
    own.add_tokens(["w58"])
    own.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="token id 60, but the model knows 60"):
        Session(checkpoint).read("w58")


def test_a_base_opens_on_its_router_and_without_one_on_every_layer(tmp_path, monkeypatch):
    from dlr.explore import opening
    checkpoint, base = _other_checkpoint(tmp_path), str(tmp_path / "base")
    bare = Session(base=base)
    found = bare.read("w3 w4")
    assert found.gates.all() and found.meta["model"] == f"{base}, no router" and "no router" in bare.note
    assert bare.calibrated == 0 and bare.source == (None, base) and not Session(*bare.source).folder
    given = Session(checkpoint, base)
    assert given.folder == checkpoint and given.source == (checkpoint, base)
    with pytest.raises(ValueError, match="was made for"):
        Session("nano-router", base)
    monkeypatch.setattr(opening, "router_for", lambda name: checkpoint if name == base else None)
    assert Session(base=base).folder == checkpoint
    monkeypatch.undo()
    assert opening.router_for("nano") == find_checkpoint("nano-router") and opening.router_for(base) is None


def test_paths_mean_what_they_mean_here_and_else_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("dlr/nano/router") == NANO / "router" and find_checkpoint("nano-router") == NANO / "router"
    (tmp_path / "dlr" / "nano").mkdir(parents=True)
    shutil.copytree(NANO / "router", tmp_path / "dlr" / "nano" / "router")
    assert find_checkpoint("dlr/nano/router").resolve() == tmp_path / "dlr" / "nano" / "router"


def test_dtype_and_device_reach_every_model_that_is_opened(monkeypatch):
    from dlr.explore import opening as module
    seen = []

    def opened(name, variant, say, **loading):
        seen.append(loading)
        model = dlr.load(name, say=say)
        if loading:
            warnings.warn_explicit(f"{model.folder} was made in <float32>", UserWarning, module.__file__, 1)
        return model

    monkeypatch.setattr(module, "load", opened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Session(dtype=None, device=None).close()
    both = Comparison(text="Some text.", dtype="bfloat16", device="cpu")
    assert "embedded router was made in &lt;float32&gt;" in both.view.value, "what loading warns of is said in the view"
    both.close()
    assert seen == [{}, {"dtype": "bfloat16", "device": "cpu"}]
    with pytest.raises(ValueError, match="have no effect.*given: dtype"):
        Session(model=both, tokenizer=both, dtype="bfloat16")


def test_any_token_that_ends_a_text_ends_a_continuation(session):
    """The tokenizer's, those of the generation settings (one or a list), or none at all."""
    from types import SimpleNamespace as Has

    from dlr.explore.stream import generate, stop_ids
    for eos, named, expected in ((0, None, {0}), (None, [5, 6], {5, 6}), (0, 7, {0, 7}), (None, None, set())):
        given = Has(tokenizer=Has(eos_token_id=eos), model=Has(generation_config=Has(eos_token_id=named)))
        assert stop_ids(given) == expected
    *_, free = generate(session, "A", 8)
    settings, stop = session.model.generation_config, free.routed.ids[2]
    before, settings.eos_token_id = settings.eos_token_id, [4000, stop]
    try:
        *_, ended = generate(session, "A", 8, dense=False)
    finally:
        settings.eos_token_id = before
    assert ended.routed.ids == free.routed.ids[:free.routed.ids.index(stop) + 1]


def test_a_page_shows_no_more_tokens_than_a_browser_bears(session, monkeypatch):
    monkeypatch.setattr(views, "LONGEST", 20)
    explorer = Explorer(session=session, text="word " * 50)
    assert len(explorer.record) == 20 and "Cut to 20 of" in explorer.view.value and "shown here" in explorer.view.value
    explorer.budget.value = 60
    assert len(explorer.record) == 20 and not explorer.record.loss_routed[:-1].isnan().any()


@pytest.mark.slow
def test_a_slider_move_redraws_256_tokens_at_once():
    """In processor time, so that a busy machine counts no more than a quiet one: 0.3 s there, and 2 s with losses, times five."""
    explorer = Explorer(text="the quick brown fox jumps over a lazy dog " * 17)
    explorer.settle = explorer._settle_later.action = lambda: None
    times = []
    for budget in (30, 50, 20, 60, 45):
        start = time.process_time()
        explorer.budget.value = budget
        times.append(time.process_time() - start)
    assert 240 <= len(explorer.record) <= 280
    assert sorted(times)[2] < 1.5
    start = time.process_time()
    Explorer.settle(explorer)                              # losses and predictions at the new budget
    settled = sorted(times)[2] + time.process_time() - start
    print(f"{len(explorer.record)} tokens redrawn in {1000 * sorted(times)[2]:.0f} ms, with losses in {settled:.2f} s")
    assert not explorer.record.loss_routed[:-1].isnan().any() and settled < 10
    explorer.close()


def test_the_terminal_view_holds_every_token(capsys):
    from dlr.__main__ import main
    assert main(["explore", "Short <b>text</b>.", "--plain", "--skip", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "skipped" in out and all(piece in out for piece in ("Sh", "ort", "text", "layer  15"))
