"""The explorer on the embedded router: widget values in, views and files out; models given back bitwise."""

import asyncio
import hashlib
import time

import pytest
import torch

import dlr
from dlr.__main__ import main
from dlr.base.find import EMBEDDED, SMOLLM2, checkpoints, find_checkpoint, router_for
from dlr.base.models import NANO_ROUTER
from dlr.explore import html as views
from dlr.explore.session import Session
from dlr.explore.stream import generate
from dlr.explore.tabs import STATIC, Comparison, Generator, Workbench
from dlr.explore.widgets import EXAMPLES, Explorer
from dlr.routing.decoder import NotRoutable
from dlr.routing.weights import causal_lm

pytestmark = pytest.mark.skipif(not (NANO_ROUTER / "router_config.json").is_file(),
                                reason="the embedded router (dlr/nano/router) is not there")
TEXT = "The old keeper climbed the stairs and lit the lamp."


@pytest.fixture(scope="module")
def shared():
    session = Session()
    yield session
    session.close()


def digest(model) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_the_first_view_is_there_at_once():
    """Under 5 s on a quiet machine; shared ones get three times that."""
    start = time.perf_counter()
    explorer = Explorer()
    assert explorer.error is None and "data-depth" in explorer.view.value and time.perf_counter() - start < 15
    explorer.close()


def test_the_view_follows_text_budget_layers_and_shade(shared):
    explorer = Explorer(text=TEXT, session=shared)
    first = explorer.view.value
    assert explorer.error is None and "keeper"[-2:] in first and views.view(
        explorer.record, explorer.cost, explorer.look, explorer.note) == first
    explorer.budget.value = 60
    assert explorer.view.value != first and explorer.record.skip_ratio > 0.4
    assert explorer.record.loss_routed[:-1].isfinite().all(), "losses follow once the slider rests"
    explorer.budget.value = 0
    assert explorer.record.skip_ratio == 0.0
    explorer.layers.value = (4, 9)
    assert "of layers 4–9" in explorer.view.value
    explorer.shade.value = False
    explorer.text.value = "Other words."
    assert explorer.record.meta["text"] == "Other words." and explorer.error is None
    explorer.example.value = EXAMPLES["code"]
    assert explorer.text.value == EXAMPLES["code"]


def test_moving_the_slider_keeps_the_router_s_logits_and_agrees_with_a_fresh_reading(shared):
    found = shared.read(TEXT)
    for skip in (0.2, 0.5):
        quick = shared.at_skip(found, skip)
        fresh = shared.read(TEXT, threshold=shared.threshold(skip))
        assert torch.equal(quick.gates, fresh.gates)
        passes = []
        handle = shared.routing.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
        settled = shared.losses(quick)
        handle.remove()
        assert len(passes) == 1, "the base model's pass over the text is known"
        for name in ("loss_routed", "loss_dense", "kl"):
            assert torch.equal(getattr(settled, name)[:-1], getattr(fresh, name)[:-1])
        with dlr.budget(shared.model, skip):
            assert torch.equal(shared.read(TEXT).gates, fresh.gates)


def test_while_the_slider_moves_unknown_numbers_are_shown_as_unknown(shared):
    explorer = Explorer(text=TEXT, session=shared)

    async def drag():
        explorer.budget.value = 30
        during = explorer.view.value
        await asyncio.sleep(1.2)
        return during

    during = asyncio.run(drag())
    assert "recomputing…" in during and "recomputing…" not in explorer.view.value



def test_an_exception_in_the_model_is_said_and_the_next_input_works(shared):
    explorer = Explorer(text=TEXT, session=shared)

    def fail(module, args):
        raise RuntimeError("<b>broken</b> layer")

    handle = shared.routing.layers[2].register_forward_pre_hook(fail)
    try:
        explorer.text.value = "This one fails."
    finally:
        handle.remove()
    assert isinstance(explorer.error, RuntimeError) and "role=alert" in explorer.view.value
    assert "&lt;b&gt;broken&lt;/b&gt; layer" in explorer.view.value
    assert explorer.export("unused") == [] and "nothing to export" in explorer.downloads.value
    explorer.text.value = "This one works."
    assert explorer.error is None and "role=alert" not in explorer.view.value


def test_two_explorers_do_not_disturb_each_other_and_closing_one_frees_its_model():
    first, second = Explorer(text=TEXT), Explorer(text=TEXT)
    assert causal_lm(first.session.model) is not causal_lm(second.session.model)
    before = second.view.value
    first.budget.value = 70
    assert second.view.value == before and second.record.skip_ratio < first.record.skip_ratio
    base = causal_lm(first.session.model)
    fresh, _ = dlr.base.models.load_base()
    session = first.session
    first.close()
    assert session.model is None and digest(base) == digest(fresh)
    with pytest.raises(NotRoutable):
        dlr.routing_of(base)
    hooks = [h for m in base.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not hooks
    ids = torch.tensor([[0, 300, 301, 302]])
    assert torch.equal(base(ids).logits, fresh(ids).logits)
    second.text.value = "Still alive."
    assert second.error is None
    second.close()



def test_compare_budgets_and_the_best_static_plan(shared):
    comparison = Comparison(text=TEXT, session=shared)
    assert comparison.error is None
    comparison.budgets["second"].value = comparison.budgets["first"].value
    assert "0 of" in comparison.view.value and torch.equal(*(r.gates for r in comparison.records))
    comparison.plan.value = STATIC
    first, second = comparison.records
    free = second.position > 0
    assert second.gates[free].unique(dim=0).shape[0] == 1 and abs(first.skip_ratio - second.skip_ratio) < 1 / 12
    assert "best static plan" in comparison.view.value and comparison.error is None


def test_generation_streams_depths_stops_and_runs_again(shared):
    tab = Generator(session=shared, prompt="The")
    tab.tokens.value, tab.temperature.value = 6, 0.0
    tab.run()
    ids = tab.progress.routed.ids
    assert tab.error is None and 1 <= len(ids) <= 6 and tab.progress.done
    assert tab.progress.routed.rate > 0 and tab.progress.dense.rate > 0
    prompt = torch.tensor([[0, *shared.tokenizer("The", add_special_tokens=False)["input_ids"]]])
    shared.model.generation_config.eos_token_id = shared.tokenizer.eos_token_id
    expected = shared.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert expected[0, prompt.shape[1]:].tolist() == ids
    tab.prompt.value = "word " * 1500
    tab.run()
    assert isinstance(tab.error, ValueError) and "context" in tab.view.value and not tab.start.disabled
    steps = generate(shared, "A", 50)
    for _ in range(3):
        progress = next(steps)
    assert len(progress.routed.ids) == 3 and len(progress.routed.depths) == 2
    tab.prompt.value = "The"

    async def stop_early():
        tab.tokens.value = 400
        tab.run()
        await asyncio.sleep(0.3)
        tab.halt()
        await asyncio.sleep(0.5)

    asyncio.run(stop_early())
    assert tab.progress.done and len(tab.progress.routed.ids) < 400 and tab.stop.disabled


def test_the_workbench_opens_its_tabs_when_chosen():
    bench = Workbench(text="Tabs.")
    assert bench.comparison is None and bench.generator is None
    bench.selected_index = 1
    bench.selected_index = 2
    assert bench.comparison.error is None and bench.generator is not None
    made, bench.comparison.source = bench.comparison, ("another checkpoint's folder", None)
    bench.selected_index = 1
    assert bench.comparison is not made and bench.children[1] is bench.comparison, "made anew for the explorer's checkpoint"
    bench.close()


def test_checkpoints_are_the_embedded_router_and_those_of_finished_runs(tmp_path):
    import shutil
    for run, finished in (("token_routing/done", True), ("token_routing/half", False), ("scratch/pareto/trial", True)):
        shutil.copytree(NANO_ROUTER, tmp_path / run / "DLR" / "checkpoint")
        if finished:
            (tmp_path / run / "metrics.json").write_text('{"rows": []}')
    found = checkpoints(tmp_path)
    assert list(found) == [EMBEDDED, SMOLLM2, "token_routing/done/DLR", "scratch/pareto/trial/DLR"]
    assert find_checkpoint(None) == NANO_ROUTER and router_for("smollm2") == find_checkpoint("smollm2-router")
    with pytest.raises(FileNotFoundError, match="There are: embedded router"):
        Session("no/folder")



def test_the_command_prints_the_strip_and_writes_files(tmp_path, capsys):
    assert main(["explore", TEXT, "--plain", "--skip", "0.3", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "skipped" in said and "keeper"[-2:] in said and "\x1b" not in said
    assert (tmp_path / "tokens.html").is_file()
    assert main(["explore", TEXT, "--checkpoint", "nowhere"]) == 2
    assert "embedded router" in capsys.readouterr().err
