"""The one opener: what it gives is ready to run, and what fails leaves nothing behind."""

import shutil

import pytest
import torch

import dlr
from dlr.base.find import find_checkpoint
from dlr.base.models import NANO, load_base
from dlr.measure.evaluate import calibrate
from dlr.routing.decoder import routing_of

IDS = torch.arange(300, 324).view(2, 12)


@pytest.mark.parametrize("variant", ["routed", "static", "stochastic", "dense"])
@torch.no_grad()
def test_every_variant_runs_and_generates_as_it_is_opened(variant):
    opened = dlr.load("nano-router", variant=variant,)
    model, tokenizer, routing = opened
    logits = model(IDS).logits
    assert logits.shape[:2] == IDS.shape and routing.policy is opened.policy
    if variant != "dense":
        assert routing.plan.gates.shape[:2] == IDS.shape and 0.2 < routing.plan.skip_ratio < 0.6
        with routing.at(execution="masked"):
            assert torch.allclose(model(IDS).logits, logits, atol=1e-3)
    text = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert text.shape[0] == 2 and tokenizer.decode(text[0])
    if variant in ("static", "stochastic"):
        opened.policy.keys = ["one document"]
        with pytest.raises(ValueError, match="1 documents are named.*2 rows"):
            model(IDS)


@pytest.mark.parametrize("wrong", [{"skip": 0.9}, {"variant": "static", "order": "params"}])
def test_what_fails_late_leaves_the_given_model_as_it_was(wrong):
    net, _ = load_base()
    before = net(IDS).logits
    modules = [name for name, _ in net.named_modules()]
    with pytest.raises((ValueError, OSError)):
        dlr.load("nano-router", model=net, **wrong)
    assert [name for name, _ in net.named_modules()] == modules
    assert torch.equal(net(IDS).logits, before)
    with pytest.raises(dlr.NotRoutable):
        routing_of(net)


def test_a_mistyped_checkpoint_is_never_looked_for_on_the_hub():
    for name in ("token_routing/typo", "results/typo"):
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            dlr.load(name)


@pytest.mark.parametrize("texts", ["one text", []])
def test_calibration_asks_for_a_list_of_texts(texts):
    model, tokenizer, _ = dlr.load("nano-router")
    with pytest.raises(ValueError, match="needs a list of texts"):
        calibrate(model, tokenizer, texts, 0.3)


def test_of_a_training_that_is_not_finished_the_last_state_is_meant(tmp_path):
    """As of a finished one; the state of least held-out loss lies beside both."""
    for name in ("best", "checkpoint-4"):
        folder = tmp_path / "run" / "DLR" / "trainer" / name
        shutil.copytree(NANO / "router", folder)
        (folder / "trainer_state.json").write_text("{}")
    for place in (tmp_path / "run", tmp_path / "run" / "DLR"):
        assert find_checkpoint(place, say=lambda text: None).name == "checkpoint-4"
