"""Compact execution equals masked execution, whatever the plan, the family, the padding and the cache."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, SMALL, Renamed, half_skipping, tiny
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import dlr
from dlr.base.models import add_lora
from dlr.routing import families
from dlr.routing.compact import OVERHEAD
from dlr.routing.config import RouterConfig
from dlr.routing.decoder import NotRoutable
from dlr.routing.intercept import Standin
from dlr.routing.policy import GivenPlan, Policy, RandomPlan, StaticPlan
from dlr.routing.rows import plan_rows

pytestmark = pytest.mark.usefixtures("by_rows")

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


def with_lora(model):
    """LoRA that changes something: its second factors begin at zero."""
    model = add_lora(model, rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_run_by_rows_too(family, ids):
    model = with_lora(tiny(family))
    routing = dlr.attach(model, OPEN, execution="compact")
    masked, compact = both(model, lambda: RandomPlan(0.5, 3), ids)
    assert routing.plan.skip_ratio > 0.3
    assert torch.allclose(masked, compact, atol=1e-5)


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
def test_few_skipped_rows_are_not_worth_the_gathering(llama, ids, monkeypatch):
    """A guard weighs the products saved against a constant; a layer that no row runs is never computed."""
    weights = sum(p.numel() for p in llama.model.layers[2].parameters())
    monkeypatch.setitem(OVERHEAD, "cpu", 2 * weights * 6)                     # six rows and more are worth it
    routing = dlr.attach(llama, OPEN, execution="compact")
    seen = []
    routing.layers[3].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0] * a[0].shape[1]))
    for skipped in (5, 6, 14):
        gates = torch.ones(1, 14, 4)
        gates[:, :skipped, 1] = 0
        masked, compact = both(llama, GivenPlan(gates), ids[:1])
        assert torch.allclose(masked, compact, atol=1e-5)
    assert seen == [14, 14, 14, 8, 14], "masked and compact in turns; the last compact pass never calls it"
    mask = torch.ones_like(ids)
    mask[1, :4] = 0                                                           # padding is no row anybody saves
    gates = torch.ones(*ids.shape, 4)
    gates[0, :3, 1] = 0
    masked, compact = both(llama, GivenPlan(gates), ids, attention_mask=mask)
    assert torch.allclose(masked[mask.bool()], compact[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@torch.no_grad()
def test_a_prefill_longer_than_the_sliding_window(family):
    model, ids = tiny(family), torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(4))
    routing = dlr.attach(model, OPEN, execution="compact")
    gates = plan("half", 2, 40, routing.units, 6)
    masked, compact = both(model, GivenPlan(gates), ids)
    assert torch.allclose(masked, compact, atol=1e-5)
    cache, parts = DynamicCache(config=model.config), []
    for place in (slice(0, 25), slice(25, 26), slice(26, 40)):
        with routing.using(GivenPlan(gates[:, place])):
            parts.append(model(ids[:, place], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), masked, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_the_plan(seed):
    generator = torch.Generator().manual_seed(seed)
    gates = (torch.rand(3, 90, 5, generator=generator) < torch.tensor([0.5, 0.9, 0.01, 0.0, 1.0])).float()
    real = torch.arange(90) >= torch.randint(40, (3, 1), generator=generator)
    found = plan_rows((gates > 0.5) & real.unsqueeze(-1), real)
    assert found[4] is None and found[3].count == 0 and found[3].blocks == ()
    for unit, rows in enumerate(found[:4]):
        kept = gates[..., unit].bool() & real
        assert torch.equal(rows.flat, kept.flatten().nonzero().flatten())
        assert torch.equal(rows.rest, (~kept).flatten().nonzero().flatten())
        assert torch.equal(rows.padded.flatten()[rows.source], rows.flat % 90)
        for sequence, places in zip(kept, rows.padded):
            count = int(sequence.sum())
            assert places[:count].tolist() == sequence.nonzero().flatten().tolist() and not places[count:].any()
        assert [place for start, stop, _ in rows.blocks for place in range(start, stop)] == list(range(rows.padded.shape[1]))
        assert all(keys == rows.padded[:, start:stop].max() + 1 for start, stop, keys in rows.blocks)


def test_whole_layers_that_nobody_runs_share_their_empty_rows():
    runs, real = torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    assert plan_rows(runs, real) == [None] * 4
    runs[..., 1:3] = False
    first, skipped, again, last = plan_rows(runs, real)
    assert first is last is None and skipped is again and skipped.count == 0
    assert torch.equal(skipped.rest, torch.arange(6)) and skipped.padded.shape == (2, 0)


def test_skip_adapters_compute_the_rows_that_skip_and_no_others(ids):
    model = tiny()
    routing = dlr.attach(model, RouterConfig(always_keep=2, keep_first_tokens=0, skip_adapter_rank=2), execution="compact")
    gates, seen, skipped = plan("half", *ids.shape, 4, 1), [], routing.router.skipped
    routing.router.skipped = lambda unit, x: (seen.append(x.shape[:-1].numel()), skipped(unit, x))[1]
    with torch.no_grad(), routing.using(GivenPlan(gates)):
        model(ids, use_cache=False)
    assert seen == (1 - gates).sum((0, 1)).int().tolist() and 0 < min(seen) < ids.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_attention_goes_block_by_block(family, ids, monkeypatch):
    """However short the blocks: none misses a key before it or sees one behind it, with keys shared by heads or not."""
    monkeypatch.setattr("dlr.routing.rows.BLOCK", 3)
    model = tiny(family)
    routing = dlr.attach(model, OPEN, execution="compact")
    for kind in PLANS:
        masked, compact = both(model, GivenPlan(plan(kind, *ids.shape, routing.units, 2)), ids)
        assert torch.allclose(masked, compact, atol=1e-5), kind


@torch.no_grad()
def test_lora_added_after_attaching_is_found(llama, ids):
    routing = dlr.attach(llama, OPEN, execution="compact")
    model = with_lora(llama)
    gates = plan("half", *ids.shape, routing.units)
    masked, compact = both(model, GivenPlan(gates), ids)
    assert torch.allclose(masked, compact, atol=1e-5)


@torch.no_grad()
def test_attention_that_is_called_twice_runs_part_by_part(ids):
    """DiffLlama subtracts one attention from another; handed one call's keys for both, it would be silently wrong."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**SMALL)).eval()
    routing = dlr.attach(model, OPEN, execution="compact")
    for kind in PLANS:
        masked, compact = both(model, GivenPlan(plan(kind, *ids.shape, routing.units)), ids)
        assert torch.allclose(masked, compact, atol=1e-5), kind


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
    for up in routing.router.skip.up:
        up.data.normal_(std=0.3)
    for kind in PLANS:
        masked, compact = both(llama, GivenPlan(plan(kind, *ids.shape, 4)), ids)
        assert torch.allclose(masked, compact, atol=1e-5), kind


@torch.no_grad()
def test_a_4_bit_base_is_run_by_rows(tmp_path, ids):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    wide = copy.deepcopy(FAMILIES["llama"])
    wide.hidden_size, wide.intermediate_size = 64, 128            # bitsandbytes packs weights in blocks of 64
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    dlr.attach(model, OPEN, execution="compact")
    for kind in PLANS:
        masked, compact = both(model, GivenPlan(plan(kind, *ids.shape, 4)), ids)
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


def test_the_tests_of_this_file_do_run_layers_by_rows(llama, ids, monkeypatch):
    """And without the fixture, the guard leaves layers this small alone."""
    assert OVERHEAD["cpu"] == 0.0, "the fixture is in force here"
    seen, products = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: seen.append(x.shape[:-1]) or products(x, *rest))
    routing = dlr.attach(llama, OPEN, execution="compact")
    gates = plan("half", *ids.shape, 4)
    for overhead in (0.0, 1.5e8):
        seen.clear()
        monkeypatch.setitem(OVERHEAD, "cpu", overhead)
        with torch.no_grad(), routing.using(GivenPlan(gates)):
            llama(ids)
        kept = {int(gates[..., unit].sum()) for unit in range(4)}
        assert kept <= {shape[1] for shape in seen if len(shape) == 2 and shape[0] == 1} if overhead == 0.0 else \
            all(shape.numel() == ids.numel() for shape in seen if len(shape) == 2)


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


@torch.no_grad()
def test_a_family_with_other_names_is_one_entry_in_the_table(llama, ids, monkeypatch):
    for index, layer in enumerate(llama.model.layers):
        llama.model.layers[index] = Renamed(layer)
    with pytest.raises(NotRoutable, match="its 'mixer' may mix tokens"):
        dlr.attach(llama, OPEN, execution="compact")
    entry = families.Family(attention=("mixer",), mlp=("thinker",))
    monkeypatch.setitem(families.FAMILIES, "Renamed", entry)
    routing = dlr.attach(llama, OPEN, execution="compact")
    outputs = []
    for execution in ("masked", "compact"):
        with routing.at(policy=RandomPlan(0.5, 1), execution=execution):
            outputs.append(llama(ids).logits)
    assert torch.allclose(*outputs, atol=1e-5) and routing.plan.compact
    routing.detach()
    routing = dlr.attach(llama, OPEN.changed(unit="sublayer"))
    assert routing.units == 8


def test_what_an_interrupt_leaves_on_one_model_is_tidied_there_although_another_ran_between(ids, monkeypatch):
    """Stop is heard while a block ends, so that its stand-ins stay behind."""
    first, second = tiny(), tiny("qwen2")
    for model in (first, second):
        half_skipping(model)
    with torch.no_grad():
        expected = first(ids, use_cache=False).logits
        take = Standin.take
        with monkeypatch.context() as patch:
            patch.setattr(Standin, "take", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                first(ids, use_cache=False)
        assert Standin.take == take and any(isinstance(m.__dict__.get("forward"), Standin) for m in first.modules())
        second(ids, use_cache=False)
        assert torch.equal(first(ids, use_cache=False).logits, expected)
    assert not any("forward" in m.__dict__ for m in first.modules())
