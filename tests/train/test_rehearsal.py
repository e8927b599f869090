"""A rehearsed step holds what a real one holds, and a model's few layers tell what all of them take."""

import copy

import pytest
import torch
from tiny_models import SMALL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dlr
from dlr.base.models import NANO, add_lora, load_base
from dlr.measure.storages import Storages
from dlr.routing.policy import LayerDrop
from dlr.train.rehearsal import empty_model, rehearse, sizes_of, tensors_of
from dlr.train.settings import RunConfig
from dlr.train.trainer import DLRTrainer

SHAPE = LlamaConfig(**SMALL | {"vocab_size": 997, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4})
DEFAULTS = {"always_keep": 1, "batch_size": 4, "seq_len": 48, "warm_start": False, "bf16": False, "skip_adapter_rank": 4,
            "steps": 2, "lora_rank": 4, "router_class": "Router", "router_hidden": 32, "lora_prefix": True}
CASES = {"checkpointing": {"gradient_checkpointing": True, "accumulation": 2},
         "depth router, no KD": {"router_class": "DepthRouter", "kd_weight": 0.0, "warm_start": True, "lora_prefix": False,
                                 "elastic": True},
         "4 bit": {"load_in_4bit": True, "dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True,
                   "accumulation": 2}}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("dlr.measure.logits.ELEMENTS", 997 * 4 * 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(copy.deepcopy(SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    return str(folder)


def real(folder, config):
    base, _ = load_base(folder, dtype=config.dtype, load_in_4bit=config.load_in_4bit)
    model = add_lora(base, rank=config.lora_rank, first=0 if config.lora_prefix else config.always_keep)
    routing = dlr.attach(model, config.router())
    routing.calibration.curve = [0.0] * 81
    return model, routing


@pytest.mark.parametrize("case", CASES)
def test_the_trainers_own_step_peaks_where_the_rehearsal_says(case, folder, tmp_path, monkeypatch):
    """Of real tensors: weights, optimizer, batches and log of two steps of training.

    What waits for another try, should a batch not fit, lies in the processor's memory and is not counted.
    """
    monkeypatch.setattr("dlr.train.fitting.Start", lambda *_: None)
    config = RunConfig(**DEFAULTS | CASES[case])
    planned = rehearse(SHAPE, config, whole=True)
    model, routing = real(folder, config)
    rows = [{"input_ids": torch.randint(2, 900, (config.seq_len,))} for _ in range(16)]
    trainer = DLRTrainer(model, config, rows, tmp_path)
    with Storages() as count:
        for _, tensor in tensors_of(model):
            count.hold(tensor)
        trainer.fit()
    assert count.peak.total() == pytest.approx(planned.peak.total(), rel=0.02)


@pytest.mark.parametrize("case, policy, trains", [("4 bit", LayerDrop(0.5), True), ("depth router, no KD", None, True),
                                                  ("checkpointing", None, False)])
def test_a_few_layers_tell_what_the_whole_model_takes(case, policy, trains):
    shape = type(SHAPE).from_dict(SHAPE.to_dict() | {"num_hidden_layers": 6})
    config = RunConfig(**DEFAULTS | CASES[case])
    extended, whole = (rehearse(shape, config, policy, trains=trains, whole=each) for each in (False, True))
    assert extended.parameters == whole.parameters and extended.flops == pytest.approx(whole.flops, rel=1e-4)
    assert extended.peak.total() == pytest.approx(whole.peak.total(), rel=5e-3)
    assert extended.peak["activations"] == pytest.approx(whole.peak["activations"], rel=1e-2)


def test_what_a_change_of_settings_saves():
    config = RunConfig(**DEFAULTS | {"batch_size": 8})
    full = rehearse(SHAPE, config, whole=True)
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(SHAPE).parameters())
    assert full.parameters["base"] + full.parameters["rest"] == parameters
    checkpointed = rehearse(SHAPE, config.changed(gradient_checkpointing=True), whole=True)
    assert checkpointed.peak["activations"] < full.peak["activations"] / 2 and checkpointed.flops > full.flops
    shared = rehearse(SHAPE, config, processes=2, whole=True)
    assert shared.peak["base"] == full.peak["base"] and shared.peak["activations"] < 0.6 * full.peak["activations"]
    assert shared.flops == pytest.approx(full.flops / 2, rel=0.02)


def test_what_four_bits_save():
    config = RunConfig(**DEFAULTS)
    plain, packed = (sizes_of(empty_model(SHAPE, config.changed(load_in_4bit=each))[0]) for each in (False, True))
    assert packed[0] == plain[0] and plain[1]["base"] == 4 * plain[0]["base"]
    scales = 1 / 64 + 4 / (64 * 256)                     # bytes a weight, and a little for each layer's tables
    assert packed[1]["base"] == pytest.approx((0.5 + scales) * plain[0]["base"] + 28 * (16 + 256 + 1) * 4, rel=1e-3)
    assert packed[1]["rest"] == plain[1]["rest"]
