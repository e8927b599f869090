"""LoRA merged for a while: the same function, and the very same model before, after and beside it."""

import copy
import threading

import pytest
import torch
from tiny_models import half_skipping, tiny

import dlr
from dlr.base.merged import merged
from dlr.base.models import add_lora
from dlr.measure.likelihood import frozen_base
from dlr.routing.intercept import Standin
from dlr.routing.weights import fingerprint

pytestmark = pytest.mark.usefixtures("by_rows")


@pytest.fixture(params=["llama", "gpt2", "phi3"])
def healed(request):
    """A routed model in float64 whose LoRA does something."""
    model = add_lora(tiny(request.param).double())
    half_skipping(model)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.double().eval().requires_grad_(False)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now) and \
        not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_merged_is_the_same_function_and_one_product_a_layer(healed, ids, execution):
    products, apart = [], []
    for name, module in healed.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *a: products.append(1))
    with torch.no_grad(), dlr.routing_of(healed).at(execution=execution):
        expected = healed(ids).logits
        apart += products
        products.clear()
        lora = merged(healed)
        for _ in range(2):
            with lora:
                assert torch.allclose(healed(ids).logits, expected, rtol=0, atol=1e-12)
        assert apart and not products and lora.said == "LoRA merged for the run"
        assert torch.equal(healed(ids).logits, expected)


def test_the_same_text_comes_out(healed, ids):
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids[:1])}
    with torch.no_grad():
        apart = healed.generate(ids[:1], **options)
        with merged(healed):
            assert torch.equal(healed.generate(ids[:1], **options), apart)
    assert len(apart[0]) > 16


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_are_the_very_same_after_an_error_and_within(healed, ids, error):
    before, base = weights(healed), fingerprint(healed)

    def stop(*args):
        raise error("in the middle")

    with merged(healed):
        assert fingerprint(healed) == base and same_tensors(healed, before)
    handle = dlr.routing_of(healed).layers[4].register_forward_hook(stop)
    with pytest.raises(error), torch.no_grad(), merged(healed):
        healed(ids)
    handle.remove()
    with torch.no_grad():
        healed(ids)                                   # the next pass tidies what compact rows left
    assert same(healed, before)


def test_an_interrupt_at_the_end_of_the_block_leaves_nothing_either(healed, monkeypatch):
    before, calls, take = weights(healed), [], Standin.take

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(*args, **kwargs)

    monkeypatch.setattr(Standin, "take", interrupted)
    with pytest.raises(KeyboardInterrupt), merged(healed):
        pass
    assert len(calls) > 3 and same(healed, before)


def same_tensors(model, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_base_inside_the_block_is_the_base(healed, ids):
    with frozen_base(healed, dlr.routing_of(healed)):
        expected = healed(ids).logits
    with torch.no_grad(), merged(healed):
        routed = healed(ids).logits
        with frozen_base(healed, dlr.routing_of(healed)):
            assert torch.equal(healed(ids).logits, expected)
        assert torch.equal(healed(ids).logits, routed)
        with healed.disable_adapter():
            assert not torch.allclose(healed(ids).logits, routed)
        assert torch.equal(healed(ids).logits, routed)


def test_another_adapter_in_force_is_not_passed_over(ids):
    model = add_lora(tiny().double())
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(std=0.1)
    model.double().eval()
    with torch.no_grad(), merged(model):
        first = model(ids).logits
        model.set_adapter("other")
        other = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other) and not torch.allclose(first, other)


def test_other_threads_copies_and_checkpoints_know_nothing_of_it(healed, ids, tmp_path):
    lora_runs = []
    layer = next(m for name, m in healed.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda *a: lora_runs.append(1))
    with torch.no_grad(), merged(healed):
        healed(ids)
        assert not lora_runs
        thread = threading.Thread(target=torch.no_grad()(healed), args=(ids,))
        thread.start()
        thread.join()
        assert len(lora_runs) == 1
        copied = copy.deepcopy(healed)
        copied(ids)
        assert len(lora_runs) == 2
        dlr.save_pretrained(healed, tmp_path / "checkpoint")
        healed(ids)
        assert len(lora_runs) == 2
    assert (tmp_path / "checkpoint").is_dir()


def test_detaching_within_the_block_gives_the_base_back(healed, ids):
    before = weights(healed)
    with merged(healed):
        dlr.routing_of(healed).detach()
    assert same(healed, before)


def test_what_cannot_be_merged_runs_as_it_is_and_is_named(ids, monkeypatch):
    from peft import IA3Config, LoraConfig, get_peft_model
    assert merged(tiny()).said == ""
    some = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")).eval()
    assert merged(some).said == ("LoRA merged for the run in 6 of 7 layers (lora on Embedding cannot be)")
    dora = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")).eval()
    ia3 = get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM")).eval()
    for model, kind in ((dora, "lora with magnitudes, biases or the like"), (ia3, "ia3 on Linear")):
        with torch.no_grad():
            expected = model(ids).logits
            with merged(model) as lora:
                assert torch.equal(model(ids).logits, expected)
        assert lora.said == f"LoRA not merged: {kind} cannot be"
    plain = add_lora(tiny())
    packed = add_lora(tiny()).eval()
    packed.base_model.model.model.layers[0].mlp.up_proj.base_layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    assert merged(packed).said == "LoRA merged for the run in 41 of 42 layers (lora on Linear4bit cannot be)"
    assert "in training" in merged(plain.train()).said and merged(plain.eval()).forwards
    monkeypatch.setattr("dlr.base.merged._free", lambda device: 10)
    assert merged(plain).said == "LoRA not merged: no memory for a second copy of weights"
