"""Checkpoints round-trip, hold no pickle, and refuse another base."""

import json

import pytest
import torch
from tiny_models import FAMILIES, tiny
from test_routed import OPEN, half_skipping

import dlr
from dlr.checkpoint import WrongBase, atomic_folder, fingerprint
from dlr.config import RouterConfig, RunConfig
from dlr.models import add_lora, projections_of


def routed(seed=0):
    model = add_lora(tiny(seed=seed), RunConfig(lora_rank=2))
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=1, skip_adapter_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "dlr_router.up" in name:
                parameter.normal_(std=0.1)
    routing.config.threshold = 0.125
    return model.eval()


def test_round_trip_is_exact_and_free_of_pickle(tmp_path, ids):
    model = routed()
    before = model(input_ids=ids).logits
    dlr.save_pretrained(model, tmp_path / "c")
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "router.safetensors", "router_config.json"}
    loaded = dlr.from_pretrained(tmp_path / "c", tiny())
    assert torch.equal(loaded(input_ids=ids).logits, before)
    assert dlr.routing_of(loaded).config.threshold == 0.125


def test_peft_reads_the_adapter_on_its_own(tmp_path, ids):
    from peft import PeftModel
    model = routed()
    dlr.save_pretrained(model, tmp_path / "c")
    with dlr.routing_of(model).disabled():
        dense = model(input_ids=ids).logits
    assert torch.equal(PeftModel.from_pretrained(tiny(), str(tmp_path / "c"))(input_ids=ids).logits, dense)


def test_another_base_is_refused_naming_both(tmp_path):
    dlr.save_pretrained(routed(), tmp_path / "c")
    with pytest.raises(WrongBase, match=r"made for llama \(model_type llama.*loaded onto qwen2"):
        dlr.from_pretrained(tmp_path / "c", tiny("qwen2"))
    other = tiny()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    with pytest.raises(WrongBase, match="fingerprint"):
        dlr.from_pretrained(tmp_path / "c", other)


def test_the_fingerprint_survives_bfloat16():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    before = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == before
    assert fingerprint(tiny("gpt2"))


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="router_config.json"):
        dlr.from_pretrained(tmp_path)
    dlr.save_pretrained(routed(), tmp_path / "c")
    record = json.loads((tmp_path / "c" / "router_config.json").read_text())
    (tmp_path / "c" / "router_config.json").write_text(json.dumps(record | {"treshold": 1.0}))
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        dlr.from_pretrained(tmp_path / "c", tiny())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "c") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_finds_attention_and_mlp_in_every_family(family, ids):
    names = projections_of(tiny(family))
    assert len(names) >= 3
    model = add_lora(tiny(family), RunConfig(lora_rank=2))
    dlr.attach(model, OPEN)
    assert torch.equal(model(input_ids=ids).logits, tiny(family)(ids).logits)


def test_a_four_bit_base_routes_and_trains(tmp_path, ids):
    """NF4 through bitsandbytes, on whatever device there is: gradients reach LoRA and router."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlr.models import load_base
    from dlr.objective import cross_entropy
    from dlr.policy import RouterPolicy
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                 num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path / "m")
    from transformers import AutoTokenizer

    from dlr.models import NANO
    AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path / "m")
    config = RunConfig(model=str(tmp_path / "m"), load_in_4bit=True, dtype="bfloat16", lora_rank=2)
    model, _ = load_base(config)
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    before = model(ids).logits
    model = add_lora(model, config)
    routing = dlr.attach(model, OPEN)
    assert torch.equal(model(input_ids=ids).logits, before)
    model.train()
    with routing.using(RouterPolicy(training=True)):
        loss = cross_entropy(model(input_ids=ids).logits, ids, torch.ones_like(ids).bool()).mean()
    loss.backward()
    assert all(p.grad is not None for p in routing.router.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
