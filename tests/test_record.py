"""Token records: what they hold, and that they come back whole."""

import pytest
import torch
from test_routed import half_skipping
from tiny_models import tiny
from transformers import AutoTokenizer

from dlr.config import RouterConfig
from dlr.models import NANO
from dlr.objective import cross_entropy
from dlr.record import Record, record

TEXTS = ["A short text, for once.", "Another one: 12 words <b>with</b> \N{GRINNING FACE} odd pieces."]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def model():
    from tiny_models import SMALL
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 4096})).eval()


def test_losses_are_those_of_the_next_token(model, tokenizer):
    routing = half_skipping(model, RouterConfig(always_keep=2))
    found = record(model, routing, tokenizer, TEXTS, bar=False)
    for index in range(2):
        here = found.document == index
        ids = found.ids[here][None]
        expected = cross_entropy(model(ids).logits, ids, torch.ones_like(ids).bool())
        assert torch.allclose(found.loss_routed[here][:-1], expected, atol=1e-4)
        assert found.loss_routed[here][-1].isnan()
        with routing.disabled():
            dense = cross_entropy(model(ids).logits, ids, torch.ones_like(ids).bool())
        assert torch.allclose(found.loss_dense[here][:-1], dense, atol=1e-4)
    assert found.gates[found.position == 0].all()
    assert torch.equal(found.active_layers, 2 + found.gates.sum(1))
    assert (found.kl[~found.kl.isnan()] > -1e-5).all()


def test_the_plan_at_its_own_threshold_is_the_plan(model, tokenizer):
    found = record(model, half_skipping(model, RouterConfig(always_keep=2)), tokenizer, TEXTS, bar=False)
    assert torch.equal(found.at_threshold(found.meta["threshold"]).gates, found.gates)
    ratios = [found.at_threshold(t).skip_ratio for t in (-50.0, -1.0, 0.0, 1.0, 50.0)]
    assert ratios == sorted(ratios) and ratios[0] == 0.0


def test_records_come_back_whole_and_without_a_model(model, tokenizer, tmp_path):
    found = record(model, half_skipping(model, RouterConfig(always_keep=2)), tokenizer, TEXTS, bar=False)
    found.save(tmp_path / "two")
    again = Record.load(tmp_path / "two")
    assert again.tokens == found.tokens and again.meta == found.meta
    assert torch.equal(again.gates, found.gates) and torch.equal(again.logits, found.logits)
    assert torch.allclose(again.loss_routed, found.loss_routed, equal_nan=True)
    (tmp_path / "two.json").unlink()
    with pytest.raises(FileNotFoundError, match="two.json is missing"):
        Record.load(tmp_path / "two")


def test_no_text_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        record(model, half_skipping(model), tokenizer, [])
