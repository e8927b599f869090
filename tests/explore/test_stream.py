"""Generation runs with LoRA merged, says so, and leaves nothing of it on the model."""

import pytest
import torch
from tiny_models import SMALL, half_skipping
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlr.base.models import NANO, add_lora
from dlr.explore import html, stream
from dlr.explore.session import Session


@pytest.fixture
def session():
    """A tiny model in float64 with the embedded tokenizer, a router, and LoRA that does something."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 4096})).double()
    model = add_lora(base.requires_grad_(False))
    half_skipping(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return Session(model=model.double().eval(), tokenizer=AutoTokenizer.from_pretrained(NANO))


def products_of_lora(model) -> list:
    calls: list = []
    layer = next(m for name, m in model.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda *a: calls.append(1))
    return calls


def test_text_and_depths_are_those_of_the_unmerged_model_and_the_dense_side_is_the_base(session, monkeypatch):
    calls = products_of_lora(session.model)
    *_, merged = stream.generate(session, "A word", 12)
    assert not calls and "LoRA merged for the run" in html.stream(merged, 2)

    class Apart:
        said = "LoRA not merged"

        def __init__(self, model): ...
        def __enter__(self): ...
        def __exit__(self, *error): ...

    monkeypatch.setattr(stream, "merged", Apart)
    *_, apart = stream.generate(session, "A word", 12)
    assert calls and "LoRA not merged" in html.stream(apart, 2)
    for side in ("routed", "dense"):
        ours, theirs = getattr(merged, side), getattr(apart, side)
        assert len(ours.ids) == 12 and (ours.ids, ours.depths) == (theirs.ids, theirs.depths)
    assert merged.routed.ids != merged.dense.ids
    with session.routing.at(policy=None), session.model.disable_adapter():
        *_, base = stream.generate(session, "A word", 12, dense=False)
    assert base.routed.ids == merged.dense.ids


@pytest.mark.parametrize("ended", ["closed", "interrupt", "error"])
def test_a_generation_that_ends_half_way_leaves_the_model_as_it_was(session, ended):
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    calls = products_of_lora(session.model)
    steps = stream.generate(session, "A word", 12)
    next(steps)
    assert not any("forward" in m.__dict__ for m in session.model.modules()), "between steps it is as it was"
    if ended == "closed":
        steps.close()
    else:
        error = KeyboardInterrupt if ended == "interrupt" else RuntimeError

        def stop(*args):
            raise error

        handle = session.routing.layers[-1].register_forward_hook(stop)
        with pytest.raises(error):
            next(steps)
        handle.remove()
    assert not calls
    session.read("A text.")
    assert calls, "LoRA's products are made apart again"
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in session.model.modules())
