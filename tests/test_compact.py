"""Compact execution equals masked execution, whatever the plan, the family, the padding and the cache."""

import copy

import pytest
import torch
from test_routed import half_skipping
from tiny_models import FAMILIES, tiny
from transformers import DynamicCache, StaticCache
from transformers import MambaConfig, MambaForCausalLM

import dlr
from dlr.config import RouterConfig
from dlr.models import add_lora
from dlr.pending import PendingLayer
from dlr.policy import GivenPlan, Policy, RandomPlan, StaticPlan
from dlr.routed import NotRoutable

OPEN = RouterConfig(always_keep=2, keep_first_tokens=0)
PLANS = ("none", "half", "most", "all", "one row", "whole layers")


def plan(kind, batch, length, units, seed=0):
    """Gates `[b, s, U]` of each kind of plan that has caught somebody out."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch, length, units, generator=generator)
    gates = {"none": torch.ones_like(draw), "half": draw > 0.5, "most": draw > 0.9, "all": torch.zeros_like(draw),
             "one row": torch.zeros_like(draw), "whole layers": (torch.arange(units) % 2).expand_as(draw)}[kind].float()
    if kind == "one row":
        gates[-1, length // 2] = 1.0
    return gates


@torch.no_grad()
def both(model, policy, ids, **inputs):
    """Logits of masked and of compact execution under `policy`."""
    routing, out = dlr.routing_of(model), []
    for execution in ("masked", "compact"):
        routing.execution = execution
        with routing.using(policy if isinstance(policy, Policy) else policy()):
            out.append(model(ids, **inputs).logits)
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_plan_gives_the_masked_logits(family, attention, ids):
    model = tiny(family)
    if family != "gemma2":                                   # soft-capping is eager's alone
        model.set_attn_implementation(attention)
    routing = dlr.attach(model, OPEN, execution="compact")
    for kind in PLANS:
        for seed in range(3 if kind == "half" else 1):
            masked, compact = both(model, GivenPlan(plan(kind, *ids.shape, routing.units, seed)), ids)
            assert torch.allclose(masked, compact, atol=1e-5), (kind, seed, (masked - compact).abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_lengths_give_the_masked_logits(family, side, ids):
    model = tiny(family)
    routing = dlr.attach(model, OPEN, execution="compact")
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 5, 9)):
        mask[row, slice(0, missing) if side == "left" else slice(14 - missing, 14)] = 0
    real = mask.bool()
    for kind in PLANS:
        policy = GivenPlan(plan(kind, *ids.shape, routing.units, 4))
        masked, compact = both(model, policy, ids, attention_mask=mask)
        assert torch.allclose(masked[real], compact[real], atol=1e-5), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_run_by_rows_too(family, ids):
    from dlr.config import RunConfig
    model = add_lora(tiny(family), RunConfig(lora_rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    routing = dlr.attach(model, OPEN, execution="compact")
    masked, compact = both(model, lambda: RandomPlan(0.5, 3), ids)
    assert routing.plan.skip_ratio > 0.3
    assert torch.allclose(masked, compact, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_masked_one_token_for_token(family):
    model = tiny(family)
    routing = half_skipping(model)
    ids = torch.randint(2, 97, (3, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    runs = {}
    for execution in ("masked", "compact"):
        routing.execution = execution
        runs[execution] = [model.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False),
                           model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=64, min_new_tokens=64,
                                          do_sample=False)]
    assert all(torch.equal(a, b) for a, b in zip(runs["masked"], runs["compact"]))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"cache_implementation": "static"},
                                     {"cache_implementation": "offloaded"}, {"num_beams": 2, "num_return_sequences": 2}])
def test_every_way_to_generate_equals_masked(options):
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloaded caches need a GPU")
    model = tiny()
    routing, runs = half_skipping(model), []
    ids = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(8))
    for execution in ("masked", "compact"):
        routing.execution = execution
        torch.manual_seed(3)
        runs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20, **options))
    assert torch.equal(*runs)


@pytest.mark.parametrize("chunks", [(14,), (5, 9), (1,) * 14, (6, 1, 1, 6)])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3", "gpt_neox", "opt", "falcon"])
@torch.no_grad()
def test_chunked_prefill_equals_one_pass(family, chunks, ids):
    """Cached and uncached agree, also where layers wait for many steps."""
    model = tiny(family)
    routing = dlr.attach(model, OPEN, execution="compact")
    for kind in ("half", "most", "all", "whole layers"):
        gates = plan(kind, *ids.shape, routing.units, 6)
        routing.execution = "masked"
        with routing.using(GivenPlan(gates)):
            whole = model(ids, use_cache=False).logits
        routing.execution = "compact"
        cache, start, parts = DynamicCache(config=model.config), 0, []
        for size in chunks:
            with routing.using(GivenPlan(gates[:, start:start + size])):
                parts.append(model(ids[:, start:start + size], past_key_values=cache).logits)
            start += size
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5), kind


@torch.no_grad()
def decoded(model, gates, ids, steps, execution):
    routing, cache, logits = dlr.routing_of(model), DynamicCache(config=model.config), []
    routing.execution = execution
    for place in [slice(0, ids.shape[1] - steps), *(slice(i, i + 1) for i in range(ids.shape[1] - steps, ids.shape[1]))]:
        with routing.using(GivenPlan(gates[:, place])):
            logits.append(model(ids[:, place], past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_skipped_layer_is_not_called_in_decoding_and_its_cache_is_whole_all_the_same(family, ids):
    model = tiny(family)
    routing = dlr.attach(model, OPEN, execution="compact")
    one, gates = ids[:1], torch.ones(1, 14, 4)
    gates[:, 8:, 1:3] = 0.0
    gates[:, 12, 2] = 1.0
    _, expected = decoded(model, gates, one, 6, "masked")
    calls = []
    layers = list(routing.layers)
    for index in (3, 4):
        attention = routing._compact[index - 2].parts.attention
        attention.register_forward_pre_hook(lambda m, a, index=index: calls.append(index))
    calls.clear()
    logits, cache = decoded(model, gates, one, 6, "compact")
    assert calls == [3, 4, 4], "the prefill calls each once, the one kept step calls layer 4"
    assert isinstance(cache.layers[3], PendingLayer) and cache.layers[3].waiting
    assert cache.get_seq_length(3) == 14
    copied = copy.deepcopy(cache)
    routing.detach()
    for index in range(6):
        for part in ("keys", "values"):
            mine, theirs, copies = (getattr(c.layers[index], part) for c in (cache, expected, copied))
            assert mine.shape == theirs.shape
            assert torch.allclose(mine, theirs, atol=1e-5) and torch.allclose(copies, theirs, atol=1e-5), (index, part)
    assert not cache.layers[3].waiting and len(layers) == 6


@torch.no_grad()
def test_a_cache_may_change_hands(llama, ids):
    """Compact, then masked, then dense, then compact: each finds what the others left."""
    routing = dlr.attach(llama, OPEN, execution="compact")
    gates = plan("most", *ids.shape, 4, 2)
    gates[:, 11] = 1.0                                         # the token that runs dense
    routing.execution = "masked"
    with routing.using(GivenPlan(gates)):
        whole = llama(ids, use_cache=False).logits
    cache, parts = DynamicCache(config=llama.config), []
    for place in range(14):
        routing.execution = "masked" if place in (6, 7) else "compact"
        with routing.using(None if place == 11 else GivenPlan(gates[:, place:place + 1])):
            parts.append(llama(ids[:, place:place + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    cache.crop(-5)
    assert all(layer.keys.shape[-2] == 9 for layer in cache.layers)


@torch.no_grad()
def test_static_cache_equals_no_cache(llama, ids):
    routing = dlr.attach(llama, OPEN, execution="compact")
    gates = plan("half", *ids.shape, 4, 1)
    with routing.using(GivenPlan(gates)):
        whole = llama(ids, use_cache=False).logits
    cache, parts = StaticCache(config=llama.config, max_cache_len=20), []
    for place in (slice(0, 9), slice(9, 10), slice(10, 14)):
        with routing.using(GivenPlan(gates[:, place])):
            parts.append(llama(ids[:, place], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@torch.no_grad()
def test_decode_plans_that_the_batch_shares(llama, execution):
    routing = half_skipping(llama, RouterConfig(always_keep=2, keep_first_tokens=0))
    routing.execution = execution
    ids = torch.randint(2, 97, (4, 9), generator=torch.Generator().manual_seed(8))
    for decode_plan in ("exact", "consensus", "prompt"):
        routing.decode_plan, steps = decode_plan, []
        prefill = llama(ids)
        own = routing.plan
        for token in range(30, 36):
            llama(torch.arange(4).unsqueeze(1) + token, past_key_values=prefill.past_key_values)
            steps.append(routing.plan)
        shared = [bool((plan.gates == plan.gates[:1]).all()) for plan in steps]
        assert own.gates.unique().numel() == 2, "a prefill always routes token by token"
        assert all(shared) == (decode_plan != "exact")
        if decode_plan == "prompt":
            assert all(torch.equal(plan.gates, steps[0].gates) for plan in steps)
            assert steps[0].gates[0].sum() == own.gates.sum(-1).mean().round()
        if decode_plan == "consensus":
            assert all(p.gates[0].sum() == (p.logits > 0).float().sum(-1).mean().round() for p in steps)
    with pytest.raises(ValueError, match="decode_plan='each' is not one of exact, consensus, prompt"):
        routing.decode_plan = "each"


def test_a_sequence_plan_lasts_as_long_as_its_cache(llama, ids):
    routing = half_skipping(llama, RouterConfig(always_keep=2, level="sequence", pool_tokens=4, keep_first_tokens=0))
    with torch.no_grad():
        whole = llama(ids).logits
        first = llama(ids[:, :8])
        rest = llama(ids[:, 8:], past_key_values=first.past_key_values).logits
    assert 0 < routing.plan.skip_ratio
    assert torch.allclose(rest, whole[:, 8:], atol=1e-5)


class Syncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would make the host wait for a device: scalars read, data-dependent shapes, copies to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_one_host_sync_a_forward_pass(llama, ids, padded, monkeypatch):
    routing = half_skipping(llama, RouterConfig(always_keep=2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0 if padded else 1

    def syncs():
        moved = []
        plain = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: (moved.append(1) if a == ("cpu",) else None,
                                                                   plain(x, *a, **k))[1])
        with Syncs() as counted:
            llama(ids, attention_mask=mask, use_cache=False)
        monkeypatch.setattr(torch.Tensor, "to", plain)
        return len(moved), counted.found

    with routing.disabled():
        none, dense = syncs()
    one, compact = syncs()
    assert routing.plan.skip_ratio > 0.2
    assert none == 0 and one == 1
    assert compact == dense, "beyond those of the model's own mask making"


@torch.no_grad()
def test_sublayers_run_by_their_own_rows(llama, ids):
    for skip in (0.2, 0.6, 1.0):
        routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0, unit="sublayer"), execution="compact")
        masked, compact = both(llama, lambda skip=skip: RandomPlan(skip, 5), ids)
        assert torch.allclose(masked, compact, atol=1e-5)
        routing.execution = "compact"
        text = llama.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=12, do_sample=False)
        assert torch.equal(llama(text).logits[0, 13:-1].argmax(-1), text[0, 14:])
        routing.detach()


@torch.no_grad()
def test_skip_adapters_are_carried_past_skipped_layers(llama, ids):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, skip_adapter_rank=3), execution="compact")
    for up in routing.router.up:
        up.data.normal_(std=0.3)
    for kind in PLANS:
        masked, compact = both(llama, GivenPlan(plan(kind, *ids.shape, 4)), ids)
        assert torch.allclose(masked, compact, atol=1e-5), kind


@torch.no_grad()
def test_hidden_states_and_bfloat16(ids):
    model = tiny().to(torch.bfloat16)
    routing = dlr.attach(model, OPEN, execution="compact")
    with routing.using(StaticPlan(torch.zeros(4))):
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 7 and torch.equal(states[2], states[5])
    masked, compact = both(model, lambda: RandomPlan(0.4, 1), ids)
    assert torch.allclose(masked.float(), compact.float(), atol=0.06)


def test_training_stays_masked_and_gradients_flow(llama, ids):
    routing = dlr.attach(llama, OPEN, execution="compact")
    with routing.using(RandomPlan(0.5, 1)):
        llama(ids).logits.sum().backward()
    assert all(p.grad is not None for n, p in llama.model.layers.named_parameters())


@torch.no_grad()
def test_an_error_in_the_middle_leaves_nothing_behind(llama, ids):
    before = llama(ids).logits
    routing = dlr.attach(llama, OPEN, execution="compact")

    def broken(x):
        raise RuntimeError("broken")

    llama.model.layers[4].mlp.forward = broken
    with pytest.raises(RuntimeError, match="broken"), routing.using(RandomPlan(0.5, 1)):
        llama(ids)
    del llama.model.layers[4].mlp.forward
    assert llama.config._attn_implementation == "sdpa"
    assert not any("forward" in m.__dict__ for m in llama.modules())
    routing.detach()
    assert torch.equal(llama(ids).logits, before)


def test_what_cannot_run_compacted_is_refused_with_a_sentence(llama, ids):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=6, state_size=4))
    with pytest.raises(NotRoutable, match="cannot run compacted.*execution='masked'"):
        dlr.attach(mamba, OPEN, execution="compact")
    assert dlr.attach(mamba, OPEN).execution == "masked"
    with pytest.raises(ValueError, match="execution='fast' is not one of masked, compact"):
        dlr.attach(llama, OPEN, execution="fast")


@torch.no_grad()
def test_wrong_plans_and_strange_caches_are_refused_before_any_compute(llama, ids):
    routing = dlr.attach(llama, OPEN)
    computed = []
    llama.model.layers[0].register_forward_pre_hook(lambda *a: computed.append(1))
    for policy in (StaticPlan(torch.ones(3)), GivenPlan(torch.ones(3, 13, 4)), GivenPlan(torch.ones(2, 14, 4))):
        with pytest.raises(ValueError, match="given|shape"), routing.using(policy):
            llama(ids)
    assert not computed
    cache = llama(ids).past_key_values
    routing.detach()
    dlr.attach(llama, OPEN)
    computed.clear()
    with pytest.raises(ValueError, match="begun by another router"):
        llama(ids[:, :1], past_key_values=cache)
    assert not computed
