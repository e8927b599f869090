"""Checkpoints hold what was trained, or refuse; they know their base by its weights, hold no pickle, and save safely."""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import (IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig,
                  TrainableTokensConfig, get_peft_model)
from tiny_models import FAMILIES, OPEN, SMALL, half_skipping, tiny
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig,
                          LlamaForCausalLM)

import dlr
from dlr.base.adapters import NotSaveable
from dlr.base.folder import atomic_folder
from dlr.base.models import NANO, NANO_ROUTER, add_lora, attention_of, load_base, projections_of
from dlr.base.restore import WrongBase
from dlr.measure.likelihood import cross_entropy, frozen_base
from dlr.routing.config import RouterConfig
from dlr.routing.policy import RouterPolicy
from dlr.routing.weights import fingerprint, identity


def routed(seed=0):
    model = add_lora(tiny(seed=seed), rank=2)
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=1, skip_adapter_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "dlr_router.skip.up" in name:
                parameter.normal_(std=0.1)
    routing.calibration.threshold = 0.125
    return model.eval()


def test_round_trip_is_exact_and_free_of_pickle(tmp_path, ids):
    model = routed()
    before = model(input_ids=ids).logits
    dlr.save_pretrained(model, tmp_path / "c")
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "router.safetensors", "router_config.json"}
    loaded = dlr.from_pretrained(tmp_path / "c", tiny())
    assert torch.equal(loaded(input_ids=ids).logits, before)
    assert dlr.routing_of(loaded).calibration.threshold == 0.125


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
    for change, part in ((lambda m: m.model.norm.weight.mul_(1.5), "other tensors"),
                         (lambda m: m.model.layers[2].mlp.down_proj.weight.mul_(1.5), "layer matrices"),
                         (lambda m: m.model.embed_tokens.weight[5].zero_(), "other tensors")):
        other = tiny()
        with torch.no_grad():
            change(other)
        with pytest.raises(WrongBase, match=f"weights differ.*{part}"):
            dlr.from_pretrained(tmp_path / "c", other)
    with pytest.raises(WrongBase, match="layer matrices"):
        dlr.from_pretrained(tmp_path / "c", tiny(seed=1))
    with pytest.raises(WrongBase, match="names no base model"):
        dlr.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_its_weights_whatever_its_precision_and_adapters(family):
    before = fingerprint(tiny(family))
    assert before != fingerprint(tiny(family, seed=1))
    assert fingerprint(tiny(family).to(torch.bfloat16)) == before
    adapted = add_lora(tiny(family), rank=2)
    dlr.attach(adapted, OPEN)
    assert fingerprint(adapted) == before


def test_an_offloaded_base_is_read_where_it_lies(tmp_path):
    import accelerate
    before = fingerprint(tiny())
    assert fingerprint(accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))) == before
    accelerate.disk_offload(on_disk := tiny(), tmp_path / "disk", execution_device=torch.device("cpu"))
    assert on_disk.lm_head.weight.is_meta and fingerprint(on_disk) == before
    assert fingerprint(tiny().to("meta")) == ""


def test_records_of_an_earlier_form_load_with_their_shapes_checked(tmp_path):
    dlr.save_pretrained(routed(), tmp_path / "c")
    path = tmp_path / "c" / "router_config.json"
    record = json.loads(path.read_text())
    for key in ("files", "adapter"):
        record.pop(key)
    record["base"] |= {"fingerprint": "c3635a80"}
    for key in ("dtype", "quantisation"):
        record["base"].pop(key)
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="earlier form"):
        dlr.from_pretrained(tmp_path / "c", tiny())
    with pytest.raises(WrongBase):
        dlr.from_pretrained(tmp_path / "c", tiny("qwen2"))


def test_the_embedded_router_fits_the_embedded_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = dlr.from_pretrained(NANO_ROUTER)
    assert model.dtype == torch.float32 and dlr.routing_of(model).base["name"] == "dlr-nano"


def test_another_precision_is_said_aloud(tmp_path):
    dlr.save_pretrained(routed(), tmp_path / "c")
    with pytest.warns(UserWarning, match="made on a base in float32, not quantised; this one is bfloat16"):
        dlr.from_pretrained(tmp_path / "c", tiny().to(torch.bfloat16))
    with pytest.warns(UserWarning, match="float16"):
        dlr.from_pretrained(tmp_path / "c", tiny().half())


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="router_config.json"):
        dlr.from_pretrained(tmp_path)
    dlr.save_pretrained(routed(), tmp_path / "c")
    record = json.loads((tmp_path / "c" / "router_config.json").read_text())
    (tmp_path / "c" / "router_config.json").write_text(json.dumps(record | {"treshold": 1.0}))
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        dlr.from_pretrained(tmp_path / "c", tiny())
    (tmp_path / "c" / "adapter_model.safetensors").rename(tmp_path / "c" / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        dlr.from_pretrained(tmp_path / "c", tiny())
    (tmp_path / "base").mkdir()
    torch.save({}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle only"):
        load_base(str(tmp_path / "base"))


# -- saving -------------------------------------------------------------------------------------------------------------
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "c") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@torch.no_grad()
def test_a_save_adds_its_files_and_deletes_no_other(tmp_path, ids):
    (tmp_path / "c").mkdir()
    for name in ("notes.txt", "tokenizer.json", "README.md"):
        (tmp_path / "c" / name).write_text("mine")
    dlr.save_pretrained(routed(), tmp_path / "c")
    assert all((tmp_path / "c" / name).read_text() == "mine" for name in ("notes.txt", "tokenizer.json", "README.md"))
    assert (tmp_path / "c" / "adapter_model.safetensors").exists()
    plain = tiny()                                       # then one without an adapter: the old adapter must not come back
    half_skipping(plain, RouterConfig(always_keep=2))
    dlr.save_pretrained(plain, tmp_path / "c")
    assert not (tmp_path / "c" / "adapter_model.safetensors").exists() and (tmp_path / "c" / "notes.txt").exists()
    assert torch.equal(dlr.from_pretrained(tmp_path / "c", tiny())(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("moves", range(1, 4))
def test_a_save_killed_between_two_files_never_loads(tmp_path, moves, monkeypatch):
    dlr.save_pretrained(routed(), tmp_path / "c")
    real, done = os.replace, []

    def killed(source, target):
        if Path(target).parent == tmp_path / "c":
            done.append(target)
            if len(done) > moves:
                raise KeyboardInterrupt
        real(source, target)

    other = routed()
    with torch.no_grad():
        dlr.routing_of(other).router.net[0].weight.mul_(2)
        other.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        dlr.save_pretrained(other, tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        dlr.from_pretrained(tmp_path / "c", tiny())


def test_files_of_two_saves_are_not_one_checkpoint(tmp_path):
    one, two = routed(), routed()
    dlr.save_pretrained(one, tmp_path / "a")
    with torch.no_grad():
        dlr.routing_of(two).router.net[0].weight.mul_(2)
    dlr.save_pretrained(two, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "router.safetensors", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="router.safetensors is not the file that was saved with it"):
        dlr.from_pretrained(tmp_path / "a", tiny())


def test_a_dialled_budget_is_not_saved_for_the_calibrated_one(tmp_path):
    model = routed()
    calibration = dlr.routing_of(model).calibration
    calibration.curve = [skip / 100 for skip in range(81)]
    with dlr.budget(model, 0), dlr.budget(model, 0.3):
        dlr.save_pretrained(model, tmp_path / "c")
    record = json.loads((tmp_path / "c" / "router_config.json").read_text(), parse_constant=pytest.fail)
    assert record["threshold"] == 0.125 == calibration.threshold
    calibration.threshold = float("-inf")
    with pytest.raises(ValueError, match="infinite"):
        dlr.save_pretrained(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()


# -- adapters: equal when loaded again, or refused before anything is lost ------------------------------------------------
LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
TRAINED = {
    "every linear layer": lambda: LoraConfig(**LORA | {"target_modules": "all-linear"}),
    "biases": lambda: LoraConfig(**LORA, bias="all"),
    "norms": lambda: LoraConfig(**LORA, modules_to_save=["norm", "input_layernorm"]),
    "the tied head": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embeddings": lambda: LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "single tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                             task_type="CAUSAL_LM"),
    "a prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "a prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def biased(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=True)).eval()


def stirred(model):
    """Everything that is trained gets another value."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "dlr_router" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind, attached", [*((kind, "after") for kind in TRAINED),
                                            *((kind, "before") for kind in ("every linear layer", "embeddings", "a prompt"))])
def test_what_was_trained_comes_back(kind, attached, tmp_path, ids):
    base = biased()
    dense = base(ids).logits
    if attached == "before":
        half_skipping(base, RouterConfig(always_keep=2))
    model = get_peft_model(base, TRAINED[kind]())
    if attached == "after":
        half_skipping(model, RouterConfig(always_keep=2))
    routing = dlr.routing_of(stirred(model))
    if kind == "biases":
        with pytest.raises(ValueError, match="own biases"), frozen_base(model, routing):
            pass
    else:
        with frozen_base(model, routing):
            assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-6)
    want = model(input_ids=ids).logits
    assert (want[:, -5:] - dense[:, -5:]).abs().max() > 1e-3
    dlr.save_pretrained(model, tmp_path / "c")
    loaded = dlr.from_pretrained(tmp_path / "c", biased())
    assert torch.allclose(loaded(input_ids=ids).logits, want, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_a_merged_adapter_is_refused_naming_the_remedy(tmp_path, ids):
    model = routed()
    want = model(input_ids=ids).logits
    model.merge_adapter()
    with pytest.raises(NotSaveable, match="unmerge_adapter"):
        dlr.save_pretrained(model, tmp_path / "c")
    model.unmerge_adapter()
    flat = model.merge_and_unload()
    with pytest.raises(NotSaveable, match="Save before merging.*attach a router to that"):
        dlr.save_pretrained(flat, tmp_path / "c")
    flat.save_pretrained(tmp_path / "merged")            # the remedy, as the message says
    old = dlr.routing_of(flat)
    flat = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    routing = dlr.attach(flat, old.config)
    routing.router.load_weights(old.router.weights())
    routing.calibration = old.calibration
    dlr.save_pretrained(flat, tmp_path / "c")
    assert torch.allclose(dlr.from_pretrained(tmp_path / "c")(ids).logits, want, atol=1e-4)
    with pytest.raises(WrongBase):
        dlr.from_pretrained(tmp_path / "c", tiny())


@torch.no_grad()
def test_merged_single_tokens_are_noticed(tmp_path):
    model = get_peft_model(biased(), TrainableTokensConfig(token_indices=[5], task_type="CAUSAL_LM"))
    half_skipping(model, RouterConfig(always_keep=2))
    with pytest.raises(NotSaveable, match="other tensors"):
        dlr.save_pretrained(stirred(model).merge_and_unload(), tmp_path / "c")


def test_base_weights_trained_beside_the_adapter_are_refused(tmp_path):
    model = routed()
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(NotSaveable, match="model.norm.weight.*modules_to_save"):
        dlr.save_pretrained(model, tmp_path / "c")
    with torch.no_grad():
        norm.requires_grad_(False).mul_(2)
    with pytest.raises(NotSaveable, match="no longer those the router was attached to"):
        dlr.save_pretrained(model, tmp_path / "c")
    model = get_peft_model(tiny(), LoraConfig(**LORA, init_lora_weights="pissa"))
    dlr.attach(model, OPEN)
    with pytest.raises(NotSaveable, match="pissa"):
        dlr.save_pretrained(model, tmp_path / "c")
    base = tiny()
    dlr.attach(base, OPEN)
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["dlr_router"]))
    with pytest.raises(NotSaveable, match="took in the router"):
        dlr.save_pretrained(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@torch.no_grad()
def test_a_base_that_was_resized_since_it_was_loaded_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100)
    dlr.attach(model, OPEN)
    with pytest.raises(NotSaveable, match="vocabulary 100 instead of 97"):
        dlr.save_pretrained(model, tmp_path / "c")


@torch.no_grad()
def test_a_half_precision_adapter_stays_one(tmp_path, ids):
    model = routed().to(torch.bfloat16)
    want = model(input_ids=ids).logits
    dlr.save_pretrained(model, tmp_path / "c")
    assert torch.equal(dlr.from_pretrained(tmp_path / "c", tiny().to(torch.bfloat16))(input_ids=ids).logits, want)


@torch.no_grad()
def test_an_adapter_of_another_name_is_saved_and_loaded(tmp_path, ids):
    model = get_peft_model(tiny(), LoraConfig(**LORA), adapter_name="router_a")
    half_skipping(stirred(model), RouterConfig(always_keep=2))
    want = model(input_ids=ids).logits
    dlr.save_pretrained(model, tmp_path / "c")
    loaded = dlr.from_pretrained(tmp_path / "c", tiny())
    assert torch.equal(loaded(input_ids=ids).logits, want) and loaded.active_adapters == ["router_a"]
    model.add_adapter("other", LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="holds the active one, 'router_a', and not other"):
        dlr.save_pretrained(model, tmp_path / "d")
    assert torch.equal(dlr.from_pretrained(tmp_path / "d", tiny())(input_ids=ids).logits, want)
    model.base_model.set_adapter(["router_a", "other"])
    with pytest.raises(NotSaveable, match="2 adapters are active"):
        dlr.save_pretrained(model, tmp_path / "e")


@torch.no_grad()
def test_an_adapter_added_by_transformers_is_seen(tmp_path, ids):
    model = tiny()
    dense = model(ids).logits
    model.add_adapter(LoraConfig(**LORA, init_lora_weights=False))
    routing = half_skipping(model, RouterConfig(always_keep=2))
    want = model(ids).logits
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with frozen_base(model, routing):
        assert torch.equal(model(ids).logits, dense)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model(ids).logits, want) and not torch.equal(want, dense)
    dlr.save_pretrained(model, tmp_path / "c")
    assert torch.equal(dlr.from_pretrained(tmp_path / "c", tiny())(input_ids=ids).logits, want)


# -- loading ------------------------------------------------------------------------------------------------------------
def test_a_loaded_checkpoint_can_go_on_training(tmp_path, ids):
    dlr.save_pretrained(routed(), tmp_path / "c")
    model = dlr.from_pretrained(tmp_path / "c", tiny(), is_trainable=True)
    routing = dlr.routing_of(model)
    with routing.using(RouterPolicy(training=True)):
        model(input_ids=ids).logits.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in trained) and any("dlr_router.net" in name for name in trained)
    assert not any("lora" not in name and "dlr_router" not in name for name in trained)


@torch.no_grad()
def test_a_refused_load_leaves_the_model_as_it_was(tmp_path, ids, monkeypatch):
    dlr.save_pretrained(routed(), tmp_path / "c")
    model = tiny()
    names, dense, own = [n for n, _ in model.named_modules()], model(ids).logits, set(model.__dict__)
    for target in ("dlr.routing.router.Router.load_weights", "dlr.base.restore.attach", "peft.PeftModel.load_adapter"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
            dlr.from_pretrained(tmp_path / "c", model)
        assert [n for n, _ in model.named_modules()] == names and set(model.__dict__) == own, target
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(model(ids).logits, dense)
    assert dlr.routing_of(dlr.from_pretrained(tmp_path / "c", model)).calibration.threshold == 0.125
    with pytest.raises(ValueError, match="carries adapters already"):
        dlr.from_pretrained(tmp_path / "c", add_lora(tiny(), rank=2))


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    dlr.attach(model, OPEN)
    with pytest.raises(ValueError, match="needs a folder's name"):
        dlr.save_pretrained(model, "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_finds_attention_and_mlp_in_every_family(family, ids):
    names = projections_of(tiny(family))
    assert len(names) >= 3
    model = add_lora(tiny(family), rank=2)
    dlr.attach(model, OPEN)
    assert torch.equal(model(input_ids=ids).logits, tiny(family)(ids).logits)


# -- 4 bit --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """How to load an NF4 base whose weights fill bitsandbytes' blocks of 64, so that no kernel refuses them."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
                                 initializer_range=0.1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    return {"name": str(folder), "load_in_4bit": True, "dtype": "bfloat16"}


@torch.no_grad()
def test_a_four_bit_checkpoint_comes_back_in_four_bit(four_bit, tmp_path, ids, capfd):
    model = stirred(add_lora(load_base(**four_bit)[0], rank=2))
    half_skipping(model, RouterConfig(always_keep=2))
    want = model(input_ids=ids).logits
    dlr.save_pretrained(model, tmp_path / "c")
    loaded = dlr.from_pretrained(tmp_path / "c")
    assert "4bit" in type(loaded.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__
    assert torch.equal(loaded(input_ids=ids).logits, want)
    assert f"base model: {four_bit['name']}, as" in capfd.readouterr().err
    plain = four_bit | {"load_in_4bit": False}
    for load in (lambda: dlr.from_pretrained(tmp_path / "c", load_in_4bit=False),
                 lambda: dlr.from_pretrained(tmp_path / "c", load_base(**plain)[0])):
        with pytest.warns(UserWarning, match=r"4 bit \(nf4\); this one is bfloat16, not quantised"):
            load()
    assert identity(load_base(**four_bit)[0]) != identity(load_base(**plain)[0])
    other = load_base(**four_bit)[0]
    weight = other.model.layers[1].mlp.up_proj.weight
    weight.data[::2] = 0
    with pytest.raises(WrongBase, match="layer matrices"):
        dlr.from_pretrained(tmp_path / "c", other)


def test_what_a_four_bit_base_does_not_pack_keeps_its_dtype(four_bit, tmp_path):
    """A float32 copy of embeddings and head costs 2 GB of an 8B model; checkpoints made on one get it again."""
    model = add_lora(load_base(**four_bit)[0], rank=2)
    unpacked = {tensor.dtype for name, tensor in model.named_parameters()
                if "lora_" not in name and not hasattr(tensor, "quant_state")}
    assert unpacked == {torch.bfloat16}
    dlr.attach(model, OPEN)
    dlr.save_pretrained(model, tmp_path / "c")
    file = tmp_path / "c" / "router_config.json"
    record = json.loads(file.read_text())
    assert record["base"]["dtype"] == "bfloat16"
    for dtype in ("float32", "bfloat16"):              # the first is what earlier checkpoints say, which were made on copies
        record["base"]["dtype"] = dtype
        file.write_text(json.dumps(record))
        loaded = dlr.from_pretrained(tmp_path / "c").get_base_model()
        assert loaded.lm_head.weight.dtype == loaded.model.norm.weight.dtype == getattr(torch, dtype)


def test_four_bit_gradients_are_those_of_the_unpacked_base(four_bit, ids):
    """Before and after an evaluation pass: on some processors that pass used to repack weights for a product without
    a backward."""
    import bitsandbytes.functional as bnb
    exact = four_bit | {"dtype": "float32"}
    model = stirred(add_lora(load_base(**exact)[0], rank=2))
    packed = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert packed and not any(module.support_avx512bf16_for_cpu for module in packed)
    plain = stirred(add_lora(load_base(**exact | {"load_in_4bit": False})[0], rank=2))
    with torch.no_grad():
        theirs = dict(plain.named_modules())
        for name, module in model.named_modules():
            if module in packed:
                module.compute_dtype = torch.float32
                theirs[name].weight.copy_(bnb.dequantize_4bit(module.weight.data, module.weight.quant_state))
        theirs = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            if "lora_" in name:                                      # PEFT begins with rounded ones on a 4-bit base
                theirs[name].copy_(parameter)

    def gradients(net):
        net.train().zero_grad()
        cross_entropy(net(input_ids=ids).logits, ids, torch.ones_like(ids).bool()).mean().backward()
        return torch.cat([p.grad.flatten() for n, p in net.named_parameters() if "lora_" in n])

    expected = gradients(plain)
    for _ in range(2):
        assert (gradients(model) - expected).norm() < 1e-3 * expected.norm()
        with torch.no_grad():
            model.eval()(input_ids=ids)


def test_a_users_own_four_bit_model_is_made_differentiable(four_bit):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as pack
    model = AutoModelForCausalLM.from_pretrained(four_bit["name"], quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)           # what an evaluation pass did there
    dlr.attach(model, OPEN)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    assert torch.equal(weight.data, before) and not weight.quant_state.packing_format_for_cpu


def test_the_missing_kernel_is_not_announced():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, "Failed to load CPU gemm_4bit_forward from %s", ("x",), None)
    other = logger.makeRecord(logger.name, logging.WARNING, "", 0, "something else", (), None)
    assert not logger.filter(record) and logger.filter(other)


def test_a_four_bit_base_routes_and_trains(four_bit, ids):
    """NF4 through bitsandbytes, on whatever device there is: gradients reach LoRA and router."""
    model, _ = load_base(**four_bit)
    before = model(ids).logits
    model = add_lora(model, rank=2)
    routing = dlr.attach(model, OPEN)
    assert torch.equal(model(input_ids=ids).logits, before)
    model.train()
    with routing.using(RouterPolicy(training=True)):
        loss = cross_entropy(model(input_ids=ids).logits, ids, torch.ones_like(ids).bool()).mean()
    loss.backward()
    assert all(p.grad is not None for p in routing.router.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("changes, message", [
    ({"router_hidden": 10**12}, "router_hidden"), ({"router_hidden": 50_000}, "do not fit"),
    ({"skip_adapter_rank": 60_000}, "do not fit"), ({"keep_first_tokens": 10**30}, "keep_first_tokens"),
    ({"pool_tokens": 10**12}, "pool_tokens"), ({"threshold": float("nan")}, "threshold=nan"),
    ({"threshold": float("-inf")}, "finite"), ({"curve": [0.1, 0.2]}, "81"),
    ({"curve": [float(-i) for i in range(81)]}, "never fall"), ({"base": {"name": ["x"]}}, "base.name"),
    ({"base": {"quantisation": "x"}}, "base.quantisation"), ({"base": [1]}, "base")])
def test_a_record_from_anywhere_is_refused_before_it_costs_anything(changes, message, tmp_path):
    model = tiny()
    dlr.attach(model, RouterConfig())
    dlr.save_pretrained(model, tmp_path)
    record = json.loads((tmp_path / "router_config.json").read_text())
    (tmp_path / "router_config.json").write_text(json.dumps(record | changes))
    with pytest.raises(ValueError, match=message):
        dlr.from_pretrained(tmp_path, tiny())


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000])
def test_a_record_that_is_no_record_is_refused(text, tmp_path):
    model = tiny()
    dlr.attach(model, RouterConfig())
    dlr.save_pretrained(model, tmp_path)
    (tmp_path / "router_config.json").write_text(text)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        dlr.from_pretrained(tmp_path, tiny())


def test_a_router_whose_training_diverged_is_refused(tmp_path):
    model = tiny()
    with torch.no_grad():
        dlr.attach(model, RouterConfig()).router.net[0].weight[0, 0] = float("nan")
    dlr.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="undefined numbers"):
        dlr.from_pretrained(tmp_path, tiny())


def test_folders_of_odd_names_and_anothers_pickle_beside_it(tmp_path):
    model = tiny()
    dlr.attach(model, RouterConfig())
    for name in (".hidden", "mit Leerzeichen", "日本", "a/b/c"):
        dlr.from_pretrained(dlr.save_pretrained(model, tmp_path / name), tiny())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_model.bin").write_bytes(b"not the checkpoint's")
    dlr.from_pretrained(dlr.save_pretrained(model, tmp_path / "other"), tiny())


@pytest.mark.parametrize("changes", [{"peft_type": "FOO"}, {"modules_to_save": ["lm_head"]}, {"r": 3}])
def test_an_adapter_s_settings_that_do_not_fit_are_refused_in_a_sentence(changes, tmp_path):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    dlr.attach(model, RouterConfig())
    dlr.save_pretrained(model, tmp_path)
    for name, edit in (("router_config.json", {"files": {}}), ("adapter_config.json", changes)):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text()) | edit))
    base = tiny()
    with pytest.raises(ValueError, match="does not fit this model"):
        dlr.from_pretrained(tmp_path, base)
    assert not getattr(base, "peft_config", None)


def test_an_adapter_that_would_hold_nothing_is_refused(tmp_path):
    """PEFT puts adapters of an offloaded base on 'meta', and computes something with them."""
    import accelerate
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    dlr.attach(model, RouterConfig())
    dlr.save_pretrained(model, tmp_path)
    offloaded = accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded.*device_map"):
        dlr.from_pretrained(tmp_path, offloaded)
    offloaded = accelerate.cpu_offload(tiny(), execution_device=torch.device("cpu"))
    model = get_peft_model(offloaded, LoraConfig(target_modules=["q_proj"]))
    dlr.attach(model, RouterConfig())
    with pytest.raises(NotSaveable, match="before the base is offloaded"):
        dlr.save_pretrained(model, tmp_path / "again")


def test_automatic_attention_is_flash_where_it_can_run(monkeypatch):
    assert attention_of("auto", "bfloat16") == attention_of(None, "bfloat16") == "sdpa", "no GPU here"
    assert attention_of("flash_attention_2", "float32") == "flash_attention_2", "explicit names are strict"
    for there, dtype, expected in ((True, "bfloat16", "flash_attention_2"), (True, "float32", "sdpa"), (False, "float16", "sdpa")):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("dlr.base.models.is_flash_attn_2_available", lambda: there)
        assert attention_of("auto", dtype) == expected
    monkeypatch.undo()
    assert load_base(attn_implementation="auto")[0].config._attn_implementation == "sdpa"
