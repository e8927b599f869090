"""Closed-form skip adapters: exact where a layer is linear, better than nothing where it is not."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny

import dlr
from dlr.measure.evaluate import evaluate
from dlr.measure.ridge import fit_skip_adapters
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan

ADAPTED = RouterConfig(always_keep=2, keep_first_tokens=1, skip_adapter_rank=8)


def batches():
    ids = torch.randint(2, 97, (32, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:4, 12:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "row": torch.arange(32)}]


@torch.no_grad()
def test_a_linear_low_rank_update_is_found(monkeypatch):
    model = tiny()
    routing = dlr.attach(model, ADAPTED)
    left, right = torch.randn(32, 4), torch.randn(4, 32)

    def linear(hidden_states, *args, **kwargs):
        return hidden_states + F.rms_norm(hidden_states, (32,), eps=1e-6) @ left @ right + 0.5
    monkeypatch.setattr("dlr.measure.ridge.RIDGE", 1e-9)
    layer = model.model.layers[3]
    layer.forward = linear
    explained = fit_skip_adapters(model, routing, batches())
    assert explained[1] > 0.9999
    x = torch.randn(5, 32)
    assert torch.allclose(routing.router.skipped(1, x), linear(x), atol=1e-3)


@torch.no_grad()
def test_adapters_take_a_skipping_model_nearer_to_its_base():
    model = tiny()
    routing = dlr.attach(model, ADAPTED)
    plan = StaticPlan(torch.tensor([0.0, 1, 0, 1]))
    before = evaluate(model, routing, batches(), plan, kl=True, bar=False)["kl"].sum()
    fit_skip_adapters(model, routing, batches())
    after = evaluate(model, routing, batches(), plan, kl=True, bar=False)["kl"].sum()
    assert after < before


def test_without_adapters_there_is_nothing_to_fit(llama):
    routing = dlr.attach(llama, RouterConfig(always_keep=2))
    with pytest.raises(ValueError, match="skip_adapter_rank above 0"):
        fit_skip_adapters(llama, routing, batches())
    routing.detach()
    with pytest.raises(dlr.NotRoutable, match="stands in for whole layers"):
        dlr.attach(llama, RouterConfig(always_keep=2, unit="sublayer", skip_adapter_rank=4))
