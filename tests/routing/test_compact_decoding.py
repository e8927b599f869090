"""Compact execution with a cache: generation, chunks, layers that wait, caches that change hands, shared decode plans."""

import copy

import pytest
import torch
from test_compact import OPEN, plan
from tiny_models import FAMILIES, half_skipping, tiny
from transformers import DynamicCache, StaticCache

import dlr
from dlr.routing.compact import OVERHEAD
from dlr.routing.config import RouterConfig
from dlr.routing.owed import PendingLayer
from dlr.routing.policy import GivenPlan

pytestmark = pytest.mark.usefixtures("by_rows")


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
        attention = routing.compact_layers[index - 2].parts.attention
        attention.register_forward_pre_hook(lambda m, a, index=index: calls.append(index))
    calls.clear()
    logits, cache = decoded(model, gates, one, 6, "compact")
    assert calls == [3, 4, 4], "the prefill calls each once, the one kept step layer 4, for its row and all keys owed"
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


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3"])
@pytest.mark.parametrize("overhead", [0.0, 1e15])
def test_owed_inputs_go_along_with_the_run_that_needs_their_keys(family, overhead, ids, monkeypatch):
    """By rows, or in full where that costs less."""
    monkeypatch.setitem(OVERHEAD, "cpu", overhead)
    model = tiny(family)
    dlr.attach(model, OPEN, execution="compact")
    gates = plan("half", *ids.shape, 4, 3)
    gates[:, 5:9] = 0.0                                          # nobody runs them: their keys are owed
    gates[0, 9, 1:3] = 1.0
    _, masked = decoded(model, gates, ids, 9, "masked")
    (expected, _), (logits, cache) = (decoded(model, gates, ids, 9, way) for way in ("masked", "compact"))
    assert torch.allclose(logits, expected, atol=1e-5)
    for mine, theirs in zip(cache.layers, masked.layers):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-5) and torch.allclose(mine.values, theirs.values, atol=1e-5)
