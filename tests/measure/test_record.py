"""Token records: what they hold, and that they come back whole."""

import copy
import json
import math

import pytest
import torch
from tiny_models import FAMILIES, SMALL, half_skipping
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dlr.measure.likelihood import cross_entropy
from dlr.measure.record import TENSORS, Record, record
from dlr.routing.config import RouterConfig

TEXTS = ["A short text, for once.", "Another one: 12 words <b>with</b> \N{GRINNING FACE} odd pieces."]


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


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "phi3"])
def test_chunks_of_logits_give_the_same_record(family, tokenizer, monkeypatch):
    """Gemma caps its logits and Granite scales them after the head; OPT's decoder lies one module deeper."""
    from dlr.measure import logits
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size = 4096
    if family == "gemma2":
        config.final_logit_softcapping = 0.5
    if family == "granite":
        config.logits_scaling = 7.0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    routing = half_skipping(model, RouterConfig(always_keep=2))
    whole = record(model, routing, tokenizer, TEXTS, bar=False)
    monkeypatch.setattr(logits, "ELEMENTS", 3 * 4096)
    assert len(logits.chunks(model, 10)) == 4
    parts = record(model, routing, tokenizer, TEXTS, bar=False)
    for name in TENSORS:
        assert torch.allclose(getattr(whole, name).double(), getattr(parts, name).double(), atol=1e-5, equal_nan=True), name


def test_memory_does_not_grow_with_text_times_vocabulary(tokenizer):
    """No tensor of 1,000 tokens times 50,000 words is ever made, not even in the model's own pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from dlr.measure.logits import ELEMENTS
    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(t.numel() for t in torch.utils._pytree.tree_leaves(result)
                                            if isinstance(t, torch.Tensor))])
            return result

    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 50_000, "max_position_embeddings": 1024})).eval()
    routing = half_skipping(model, RouterConfig(always_keep=2))
    with Sizes():
        found = record(model, routing, tokenizer, ["many words of a long text " * 300], max_len=1000, bar=False)
    assert len(found) == 1000 and largest[0] <= ELEMENTS < 1000 * 50_000 / 3


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer):
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 300})).eval()
    with pytest.raises(ValueError, match="knows 300 tokens only"):
        record(model, half_skipping(model, RouterConfig(always_keep=2)), tokenizer, TEXTS, bar=False)


def test_a_record_that_skips_nothing_is_standard_json_and_comes_back(model, tokenizer, tmp_path):
    found = record(model, half_skipping(model, RouterConfig(always_keep=2)), tokenizer, TEXTS, bar=False)
    found = found.at_threshold(-math.inf)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    path = found.save(tmp_path / "all")
    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    again = Record.load(path)
    assert again.meta == found.meta and again.meta["threshold"] == -math.inf and again.skip_ratio == 0.0
    assert torch.equal(again.at_threshold(again.meta["threshold"]).gates, found.gates)


def test_chunks_see_the_adapters_of_the_head(model, tokenizer, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from dlr.measure import logits
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()
    routing = half_skipping(model, RouterConfig(always_keep=2))
    whole = record(model, routing, tokenizer, TEXTS[:1], bar=False)
    monkeypatch.setattr(logits, "ELEMENTS", 3 * 4096)
    parts = record(model, routing, tokenizer, TEXTS[:1], bar=False)
    assert torch.allclose(whole.loss_routed, parts.loss_routed, atol=1e-4, equal_nan=True)
    assert torch.allclose(whole.loss_dense, parts.loss_dense, atol=1e-4, equal_nan=True)
    assert not torch.allclose(whole.loss_routed, whole.loss_dense, atol=1e-2, equal_nan=True)
