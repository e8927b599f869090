"""What attaching means: nothing changes until a gate closes, and detaching leaves nothing."""

import pytest
import torch
from tiny_models import FAMILIES, OPEN, half_skipping, tiny
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import dlr
from dlr.routing.config import RouterConfig
from dlr.routing.decoder import NotRoutable, decoder_and_layers
from dlr.routing.policy import GivenPlan, RandomPlan, RouterPolicy, ShuffledPlan, StaticPlan

pytestmark = pytest.mark.usefixtures("by_rows")


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_base_model_bitwise_and_detach_restores_it(family, ids):
    model = tiny(family)
    keys, before = list(model.state_dict()), model(ids, output_hidden_states=True)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    routing = dlr.attach(model, OPEN)
    during = model(ids, output_hidden_states=True)
    assert routing.plan.skip_ratio == 0.0
    assert torch.equal(before.logits, during.logits)
    assert list(model.state_dict()) == keys
    assert len(during.hidden_states) == len(before.hidden_states) == 7
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False), tokens)
    with routing.using(RandomPlan(0.5)):
        assert not torch.equal(model(ids).logits, before.logits)
    routing.detach()
    assert torch.equal(model(ids).logits, before.logits)
    assert list(model.state_dict()) == keys
    assert not any("dlr" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_end_after_the_prefix(family, ids):
    model = tiny(family)
    routing = dlr.attach(model, OPEN)
    with routing.using(StaticPlan(torch.zeros(routing.units))):
        skipped = model(ids).logits
    routing.detach()
    _, layers = decoder_and_layers(model)
    handles = [layer.register_forward_hook(
        lambda m, args, kwargs, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0], with_kwargs=True)
        for layer in list(layers)[2:]]
    expected = model(ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(skipped, expected)


def test_closed_gates_are_embedding_prefix_norm_and_head(llama, ids):
    states = llama(ids, output_hidden_states=True).hidden_states
    expected = llama.lm_head(llama.model.norm(states[2]))
    with dlr.attach(llama, OPEN).using(StaticPlan(torch.zeros(4))):
        assert torch.equal(llama(ids).logits, expected)


def test_hidden_states_show_the_blended_stream(llama, ids):
    llama(ids, output_hidden_states=True)            # transformers installs its own hooks first
    with dlr.attach(llama, OPEN).using(StaticPlan(torch.zeros(4))):
        states = llama(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[2], states[5])


def test_state_dict_round_trips_while_attached(llama):
    dlr.attach(llama, OPEN)
    assert llama.load_state_dict(llama.state_dict(), strict=True)
    assert sum(p.requires_grad for p in llama.dlr_router.parameters()) == 6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_cached_generation_equals_uncached(family, ids):
    model = tiny(family)
    routing = half_skipping(model)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    full = model(out).logits
    assert 0.2 < routing.plan.skip_ratio < 0.8
    for step in range(10):
        assert torch.equal(full[:, 13 + step].argmax(-1), out[:, 14 + step])


def test_gates_are_causal(llama, ids):
    routing = half_skipping(llama)
    llama(ids)
    before = routing.plan.gates
    changed = ids.clone()
    changed[:, 9:] = 50
    llama(changed)
    assert torch.equal(routing.plan.gates[:, :9], before[:, :9])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_skip(llama, ids, side):
    routing = half_skipping(llama, RouterConfig(always_keep=2, keep_first_tokens=1))
    short, pad = ids[:1, :9], torch.full((1, 5), 1)
    alone = llama(short, attention_mask=torch.ones_like(short)).logits
    skip = routing.plan.skip_ratio
    joined = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = (joined != 1).long()
    mask[:, 5:] = mask[:, 5:] if side == "right" else 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    padded = llama(joined, attention_mask=mask, position_ids=position).logits
    kept = padded[:, 5:] if side == "left" else padded[:, :9]
    assert torch.allclose(kept, alone, atol=1e-5)
    assert routing.plan.skip_ratio == pytest.approx(skip)


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_a_mixed_plan_is_what_a_loop_over_the_layers_computes(llama, ids, unit, seed):
    """Written out by hand: each token takes a layer's output where its gate is 1, and its input where it is 0."""
    per_layer = 2 if unit == "sublayer" else 1
    gates = (torch.rand(3, 14, 4 * per_layer, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    decoder, positions = llama.model, torch.arange(14).unsqueeze(0)
    x = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(x, positions)
    for index, layer in enumerate(decoder.layers):
        own = gates[..., (index - 2) * per_layer:(index - 1) * per_layer] if index >= 2 else torch.ones(3, 14, per_layer)
        attention, mlp = own[..., :1], own[..., -1:]
        added = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
        between = x + (added if unit == "layer" else added * attention)
        after = between + layer.mlp(layer.post_attention_layernorm(between)) * (1 if unit == "layer" else mlp)
        x = torch.where(attention > 0.5, after, x) if unit == "layer" else after
    expected = llama.lm_head(decoder.norm(x))
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0, unit=unit))
    for execution in ("masked", "compact"):
        routing.execution = execution
        with routing.using(GivenPlan(gates)):
            assert torch.allclose(llama(ids).logits, expected, atol=1e-5)
        assert routing.plan.skip_ratio == pytest.approx(1 - gates.mean().item())
        assert torch.equal(routing.plan.active_layers, 2 + gates.sum(-1) / per_layer)


def test_first_tokens_run_everything(llama, ids):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=3))
    with routing.using(StaticPlan(torch.zeros(4))):
        llama(ids)
    assert routing.plan.gates[:, :3].min() == 1 and routing.plan.gates[:, 3:].max() == 0


def test_sublayer_units_skip_attention_and_mlp_apart(llama, ids):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0, unit="sublayer"))
    assert routing.units == 8
    with routing.using(StaticPlan(torch.zeros(8))):
        both = llama(ids).logits
    only_mlp = torch.ones(8)
    only_mlp[1::2] = 0
    with routing.using(StaticPlan(only_mlp)):
        assert not torch.equal(llama(ids).logits, both)
    assert routing.plan.active_layers.unique().item() == 4.0
    routing.detach()
    with dlr.attach(llama, OPEN).using(StaticPlan(torch.zeros(4))):
        assert torch.equal(llama(ids).logits, both)


def test_kept_last_layers_always_run(llama, ids):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_last=2, keep_first_tokens=0))
    assert routing.units == 2
    with routing.using(StaticPlan(torch.zeros(2))):
        llama(ids)
    assert routing.plan.active_layers.unique().item() == 4


def test_sequence_level_shares_one_plan_and_is_causal(llama, ids):
    routing = half_skipping(llama, RouterConfig(always_keep=2, level="sequence", pool_tokens=4, keep_first_tokens=0))
    llama(ids)
    gates = routing.plan.gates
    assert gates[:, :4].min() == 1
    assert torch.equal(gates[:, 4:], gates[:, 4:5].expand(-1, 10, -1))
    changed = ids.clone()
    changed[:, 6:] = 50
    llama(changed)
    assert torch.equal(routing.plan.gates, gates)
    out = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    full = llama(out).logits
    assert all(torch.equal(full[:, 13 + i].argmax(-1), out[:, 14 + i]) for i in range(6))


def test_shuffled_plan_keeps_the_rates_and_moves_the_tokens(llama, ids):
    routing = half_skipping(llama)
    llama(ids)
    own = routing.plan
    with routing.using(ShuffledPlan(0)):
        llama(ids)
    assert torch.allclose(routing.plan.keep_rate, own.keep_rate)
    assert not torch.equal(routing.plan.gates, own.gates)


def test_skip_adapter_starts_as_identity(llama, ids):
    plan = StaticPlan(torch.zeros(4))
    with dlr.attach(llama, OPEN).using(plan):
        without = llama(ids).logits
    dlr.routing_of(llama).detach()
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0, skip_adapter_rank=3))
    with routing.using(plan):
        assert torch.equal(llama(ids).logits, without)
        with torch.no_grad():
            routing.router.skip.up[0].fill_(0.1)
        assert not torch.equal(llama(ids).logits, without)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_dropped_keys_are_seen_by_nobody_else(family, ids):
    """kv='drop': what a skipped token would have left at a layer changes nothing, and other layers still see it."""
    model = tiny(family)
    routing = dlr.attach(model, RouterConfig(always_keep=2, keep_first_tokens=0, kv="drop"))
    assert routing.execution == "masked"
    gates = torch.ones(3, 14, 4)
    with routing.using(GivenPlan(gates)):
        opened = model(ids, use_cache=False).logits
    with routing.disabled():
        assert torch.allclose(opened, model(ids, use_cache=False).logits, atol=1e-5)
    gates[:, 5] = 0.0                                  # token 5 runs the prefix only, and leaves nothing behind it
    with routing.using(GivenPlan(gates)):
        before = model(ids, use_cache=False).logits
        bump = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
        handle = routing.layers[2].register_forward_pre_hook(
            lambda m, a, k: ((a[0].index_add(1, torch.tensor([5]), bump.expand(3, 1, -1)), *a[1:]), k), with_kwargs=True)
        after = model(ids, use_cache=False).logits
        handle.remove()
    assert torch.allclose(before[:, 6:], after[:, 6:], atol=1e-5)
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-3)
    with pytest.raises(ValueError, match="kv='drop' has no cached form.*use_cache=False"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    with pytest.raises(NotRoutable, match="kv='drop' runs masked only"):
        routing.execution = "compact"


def test_two_pass_refuses_a_cache_with_the_remedy(llama, ids):
    dlr.attach(llama, RouterConfig(always_keep=2, strategy="two_pass"))
    with pytest.raises(ValueError, match="use_cache=False"):
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    llama(ids, use_cache=False)


@pytest.mark.parametrize("kept", [6, 9])
def test_no_layer_left_to_route(llama, kept):
    with pytest.raises(NotRoutable, match=f"always_keep={kept}.*6 layers"):
        dlr.attach(llama, RouterConfig(always_keep=kept))


def test_other_architectures_are_refused_by_name(llama):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(NotRoutable, match="BertForMaskedLM is no decoder-only"):
        dlr.attach(BertForMaskedLM(BertConfig(vocab_size=20, **small)))
    with pytest.raises(NotRoutable, match="T5ForConditionalGeneration"):
        dlr.attach(T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2,
                                                       num_heads=2)))
    dlr.attach(llama, OPEN)
    with pytest.raises(NotRoutable, match="already has a router"):
        dlr.attach(llama, OPEN)


def test_a_plan_of_the_wrong_shape_is_refused(llama, ids):
    routing = dlr.attach(llama, OPEN)
    for policy in (StaticPlan(torch.ones(3)), GivenPlan(torch.ones(3, 13, 4))):
        with pytest.raises(ValueError, match="given|shape"), routing.using(policy):
            llama(ids)
    with routing.using(RouterPolicy()):
        llama(ids)                                   # an error leaves nothing behind


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_packed_documents_are_routed_as_each_alone(llama, execution):
    """By position_ids that begin again; transformers then lets no document see another."""
    ids = torch.randint(2, 97, (1, 23), generator=torch.Generator().manual_seed(5))
    places = torch.cat([torch.arange(9), torch.arange(14)]).unsqueeze(0)
    routing = half_skipping(llama, RouterConfig(always_keep=2, keep_first_tokens=2))
    with torch.no_grad(), routing.at(execution=execution):
        packed = llama(ids, position_ids=places, use_cache=False).logits
        plan = routing.plan.gates
        alone, plans = [], []
        for part in ids.split([9, 14], 1):
            alone.append(llama(part, use_cache=False).logits)
            plans.append(routing.plan.gates)
    assert torch.equal(plan, torch.cat(plans, 1)) and plan[0, 9:11].min() == 1 and plan.min() == 0
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)
