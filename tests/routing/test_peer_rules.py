"""Published rules: each is carried out as its formula says, learns, and sees no later token, unless it says so."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_budget import batches
from tiny_models import tiny

import dlr
from dlr.measure.evaluate import calibrate_router, evaluate, skip_ratio
from dlr.routing.config import RouterConfig
from dlr.routing.policy import RouterPolicy, StaticPlan

RULES = {"MoDRouter": {"keep_bias": 1.0}, "DLLMRouter": {}, "SkipGPTRouter": {"unit": "sublayer"},
         "FlexiDepthRouter": {"keep_bias": 0.0}}


def attached(rule, rank=3, **changes):
    """A random router of a rule, and random skip adapters; no gate is decided by keep_bias alone."""
    torch.manual_seed(0)
    model, options = tiny(), RULES[rule] | changes
    rank = 0 if options.get("unit") == "sublayer" else rank
    config = RouterConfig(router_class=rule, always_keep=2, router_hidden=16, skip_adapter_rank=rank, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dlr.routing.hooks.RunsMasked)
        routing = dlr.attach(model, config)
    with torch.no_grad():
        for net in routing.router.net:
            net[-1].weight.normal_(std=0.3)
        for up in routing.router.skip.up if rank else ():
            up.normal_(std=0.3)
    routing.threshold = -0.3 if rule == "MoDRouter" else 0.9 * options.get("keep_bias", 2.0)
    return model, routing


def by_hand(model, routing, ids, carried):
    """Logits of a loop over the layers; `carried(x, ran, unit)` goes on after a routable one."""
    inner, place = model.model, torch.arange(ids.shape[1])[None]
    x, rotary = inner.embed_tokens(ids), inner.rotary_emb(torch.zeros(1), place)
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    with routing.disabled():
        for index, layer in enumerate(inner.layers):
            ran = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=place)
            x = ran if index < 2 else carried(x, ran, index - 2)
    return model.lm_head(inner.norm(x))


@torch.no_grad()
def test_mixture_of_depths_is_its_formula(ids):
    model, routing = attached("MoDRouter")
    routed, plan = model(ids, use_cache=False).logits, routing.plan
    skipped = round(14 * torch.sigmoid(torch.tensor(-0.3)).item())

    def carried(x, ran, unit):
        score = routing.router(x, unit)
        order = score.squeeze(-1).clone()
        order[:, 0] = torch.inf                                            # the first token runs in any case
        gate = torch.zeros_like(order).scatter(1, order.topk(14 - skipped, 1).indices, 1.0)
        assert torch.equal(gate, plan.gates[..., unit])
        return torch.where(gate[..., None] > 0, x + score * (ran - x), routing.router.skipped(unit, x))
    assert torch.allclose(by_hand(model, routing, ids, carried), routed, atol=1e-5)


@torch.no_grad()
def test_flexidepth_is_its_formula(ids):
    model, routing = attached("FlexiDepthRouter")
    routing.threshold = 0.2
    routed, plan = model(ids, use_cache=False).logits, routing.plan
    assert 0.1 < plan.skip_ratio < 0.9

    def carried(x, ran, unit):
        g = torch.sigmoid(routing.router(x, unit) - 0.2)
        runs = g > 0.5
        runs[:, 0] = True
        assert torch.equal(runs.float(), plan.gates[..., unit:unit + 1])
        past = (1 - g) * (routing.router.skipped(unit, x) - x)
        return x + torch.where(runs, g * (ran - x), past)
    assert torch.allclose(by_hand(model, routing, ids, carried), routed, atol=1e-5)


@torch.no_grad()
def test_skipgpt_gates_attention_and_mlp_by_what_each_is_given(ids):
    model, routing = attached("SkipGPTRouter")
    routed, plan = model(ids, use_cache=False).logits, routing.plan
    assert plan.gates.shape[-1] == 8 and 0.1 < plan.skip_ratio < 0.9
    inner, place = model.model, torch.arange(14)[None]
    x, rotary = inner.embed_tokens(ids), inner.rotary_emb(torch.zeros(1), place)
    mask = torch.full((14, 14), -torch.inf).triu(1)[None, None]
    with routing.disabled():
        for index, layer in enumerate(inner.layers):
            for half, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
                given = norm(x)
                added = layer.mlp(given) if half else layer.self_attn(
                    hidden_states=given, attention_mask=mask, position_embeddings=rotary)[0]
                gate = torch.ones(3, 14, 1)
                if index >= 2:
                    unit = 2 * (index - 2) + half
                    gate = (routing.router(given, unit) > routing.threshold).float()
                    gate[:, 0] = 1
                    assert torch.equal(gate, plan.gates[..., unit:unit + 1])
                x = x + gate * added
    assert torch.allclose(model.lm_head(inner.norm(x)), routed, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_reach_every_weight_of_the_router(rule, ids):
    model, routing = attached(rule)
    model.train()
    with routing.using(RouterPolicy(training=True)):
        logits = model(ids, use_cache=False).logits
    (F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + routing.plan.budget).backward()
    for name, parameter in routing.router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_only_a_rule_that_says_so_looks_at_later_tokens(rule, ids):
    model, routing = attached(rule)
    gates = []
    for last in range(2, 34, 4):
        ids[:, 12:] = last
        model(ids, use_cache=False)
        gates.append(routing.plan.gates[:, :12].clone())
    same = all(torch.equal(gates[0], other) for other in gates)
    assert same == routing.router.causal == (rule != "MoDRouter")


@torch.no_grad()
def test_mixture_of_depths_keeps_the_same_number_of_real_tokens_in_every_layer(ids):
    model, routing = attached("MoDRouter", keep_first_tokens=2)
    routing.threshold = torch.logit(torch.tensor(0.25)).item()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, :2] = 0
    model(ids, attention_mask=mask, use_cache=False)
    kept = (routing.plan.gates * routing.plan.real[..., None]).sum(1)
    for row, tokens in enumerate((14, 8, 12)):
        assert set(kept[row].tolist()) == {tokens - round(tokens / 4 + 1e-6)}, "the forced tokens are among them"
    first = routing.plan.real & (routing.plan.position < 2)
    assert (routing.plan.gates[first] == 1).all()


@torch.no_grad()
def test_a_cache_is_refused_where_later_tokens_count(ids):
    model, routing = attached("MoDRouter")
    out = model(ids[:, :5], use_cache=True)
    with pytest.raises(ValueError, match="MoDRouter compares all tokens.*use_cache=False"):
        model(ids[:, 5:], past_key_values=out.past_key_values)
    assert model.generate(ids, max_new_tokens=2, use_cache=False, do_sample=False).shape[1] == 16
    model, routing = attached("DLLMRouter")
    whole = model(ids).logits
    out = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=out.past_key_values).logits
    assert torch.allclose(whole[:, 5:], rest, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_meets_its_budget_and_is_saved_and_loaded(rule, tmp_path, ids):
    model, routing = attached(rule)
    routing.threshold = None
    calibrate_router(model, routing, batches(), 0.4)
    measured = skip_ratio(evaluate(model, routing, batches(), RouterPolicy()))
    assert measured == pytest.approx(0.4, abs=0.03)
    dlr.save_pretrained(model, tmp_path / "c")
    with pytest.warns(dlr.routing.hooks.RunsMasked):
        again = dlr.from_pretrained(tmp_path / "c", tiny())
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, expected)
    with pytest.raises(dlr.NotRoutable, match="Use execution='masked'"), routing.at(execution="compact"):
        pass


@torch.no_grad()
def test_soft_weights_of_one_leave_the_layers_as_they_are(ids):
    for rule in ("MoDRouter", "FlexiDepthRouter"):
        model, routing = attached(rule)
        with routing.disabled():
            dense = model(ids).logits
        for net in routing.router.net:
            net[-1].weight.zero_()
            net[-1].bias.fill_(1.0 if rule == "MoDRouter" else 40.0)
        with routing.using(StaticPlan(torch.ones(4))):
            assert torch.allclose(model(ids).logits, dense, atol=1e-5)
