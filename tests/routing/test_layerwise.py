"""A router that decides on each layer from the state before it: one subclass, masked only."""

from types import SimpleNamespace

import pytest
import torch
from test_budget import batches
from tiny_models import tiny
from torch import nn

import dlr
from dlr.measure.evaluate import calibrate_router, evaluate, router_logits, skip_ratio
from dlr.measure.record import Record
from dlr.routing.config import RouterConfig
from dlr.routing.policy import RouterPolicy, ShuffledPlan, StaticPlan
from dlr.routing.router import Dense, Router
from dlr.settings import SettingsError


class LayerByLayer(Router):
    """One linear map a unit."""
    ahead = False

    def __init__(self, width, units, config):
        super().__init__(width, units, config)
        self.net = nn.ModuleList(Dense(width, 1) for _ in range(units))

    @classmethod
    def sizes(cls, tensors):
        return tensors["net.0.weight"].shape[-1], len([name for name in tensors if name.endswith("weight")])

    def forward(self, hidden, unit):
        return self.net[unit](hidden.float())


CONFIG = RouterConfig(router_class="LayerByLayer", always_keep=2, keep_first_tokens=1)


def attached(**changes):
    torch.manual_seed(0)
    model = tiny()
    with pytest.warns(dlr.routing.hooks.RunsMasked, match="no plan is known ahead"):
        return model, dlr.attach(model, CONFIG.changed(**changes))


@torch.no_grad()
def test_masked_execution_is_the_loop_written_by_hand(ids):
    model, routing = attached()
    routed = model(ids).logits
    plan, expected = routing.plan, []
    assert 0.1 < plan.skip_ratio < 0.9 and plan.logits.shape == plan.gates.shape == (*ids.shape, 4)
    with routing.disabled():
        inner = model.model
        place = torch.arange(ids.shape[1])[None]
        x, rotary = inner.embed_tokens(ids), inner.rotary_emb(torch.zeros(1), place)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for index, layer in enumerate(inner.layers):
            out = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=place)
            gate = torch.ones_like(x[..., :1])
            if index >= 2:
                gate = ((routing.router(x, index - 2) > 0) | (place[..., None] < 1)).float()
                expected.append(gate)
            x = torch.where(gate > 0, out, x)
    assert torch.equal(plan.gates, torch.cat(expected, -1))
    assert torch.allclose(routed, model.lm_head(inner.norm(x)), atol=1e-5)
    cache, parts = None, []
    for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), routed, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kv": "drop"}])
def test_it_learns(options, ids):
    model, routing = attached(**options)
    model.train()
    with routing.using(RouterPolicy(training=True)):
        model(ids, use_cache=False).logits.float().logsumexp(-1).mean().add(routing.plan.budget).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in routing.router.parameters())


def test_what_needs_a_plan_ahead_is_refused_in_a_sentence(ids):
    model, routing = attached()
    for change in ({"execution": "compact"}, {"strategy": "two_pass"}, {"decode_plan": "prompt"}):
        with pytest.raises(dlr.NotRoutable, match="LayerByLayer decides on each layer.*Use"), routing.at(**change):
            pass
    with pytest.raises(ValueError, match="A shuffled plan needs all decisions"), routing.using(ShuffledPlan()):
        model(ids)
    with pytest.raises(ValueError, match="A calibration curve needs all decisions"):
        router_logits(model, routing, batches())
    routing.detach()
    for change in ({"level": "sequence"}, {"strategy": "two_pass"}):
        with pytest.raises(dlr.NotRoutable, match=f"which {next(iter(change))}="):
            dlr.attach(model, CONFIG.changed(**change))
    with pytest.raises(dlr.NotRoutable, match="known ahead"):
        dlr.attach(model, CONFIG, execution="compact")
    with pytest.raises(SettingsError, match="router_class='LayerByLayr' is no router; there are .*LayerByLayer.* Router"):
        dlr.attach(model, CONFIG.changed(router_class="LayerByLayr"))


def test_its_threshold_is_found_by_bisection_and_it_is_saved_and_loaded(tmp_path, ids):
    model, routing = attached()
    skip = calibrate_router(model, routing, batches(), 0.4)
    measured = skip_ratio(evaluate(model, routing, batches(), RouterPolicy()))
    assert skip == measured == pytest.approx(0.4, abs=0.02) and not routing.calibration.curve
    dlr.save_pretrained(model, tmp_path / "c")
    with pytest.warns(dlr.routing.hooks.RunsMasked):
        again = dlr.from_pretrained(tmp_path / "c", tiny())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with routing.using(StaticPlan(torch.zeros(4))), torch.no_grad():
        model(ids)
    assert routing.plan.logits is None and routing.plan.skip_ratio > 0.9, "other plans are still known ahead"


def test_a_record_of_it_is_not_planned_again():
    record = SimpleNamespace(meta={"replannable": False})
    with pytest.raises(ValueError, match="Record the text anew"):
        Record.at_threshold(record, 0.0)
