"""Losses on a few rows at a time are the losses of the whole batch, gradients too, and smaller in memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import dlr
from dlr.base.models import add_lora
from dlr.measure.likelihood import cross_entropy, frozen_base, kl_to_teacher
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan
from dlr.train.losses import losses

IDS = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 13:] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
POLICY = StaticPlan(torch.tensor([1.0, 0, 1, 1]))


@pytest.fixture(params=["q_proj", "lm_head"])
def student(request):
    """Routed and with LoRA that does something; once on the head too."""
    model = tiny()
    if request.param == "lm_head":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    else:
        model = add_lora(model, rank=2)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    routing = dlr.attach(model, RouterConfig(always_keep=2))
    return model, routing


def plain(model, routing, temperature):
    with frozen_base(model, routing):
        teacher = model(**INPUTS, use_cache=False).logits
    with routing.using(POLICY):
        logits = model(**INPUTS, use_cache=False).logits
    real = MASK.bool()
    return cross_entropy(logits, IDS, real), kl_to_teacher(logits, teacher, real, temperature)


def gradients(model, ce, kd):
    model.zero_grad()
    (ce.mean() + 0.7 * kd.mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_losses_and_gradients_are_the_plain_ones(student, monkeypatch):
    model, routing = student
    expected = plain(model, routing, 2.0)
    whole = gradients(model, *expected)
    assert any("lora_B" in name for name in whole)
    for elements in (10**9, 97 * 3 * 6, 1):              # all at once, six places, one place
        monkeypatch.setattr("dlr.measure.logits.ELEMENTS", elements)
        ce, kd = losses(model, routing, INPUTS, POLICY, 2.0)
        assert ce.mean().item() == pytest.approx(expected[0].mean().item(), rel=1e-5)
        assert kd.mean().item() == pytest.approx(expected[1].mean().item(), rel=1e-5)
        assert routing.plan.skip_ratio == pytest.approx(0.25, abs=0.05), "the newest plan is the student's"
        for name, gradient in gradients(model, ce, kd).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5)


def test_without_a_teacher_none_runs(student):
    model, routing = student
    ran = []
    handle = routing.layers[0].register_forward_hook(lambda *given: ran.append(1))
    ce, kd = losses(model, routing, INPUTS, POLICY, None)
    handle.remove()
    assert kd is None and ran == [1] and len(ce) == 19 + 12 + 19


class Largest(TorchDispatchMode):
    """Remembers the most elements that one tensor had."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (97,):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()        # of a view, what it shows
                self.elements = max(self.elements, held)
        return out


def test_the_logits_of_the_whole_batch_are_never_there(student, monkeypatch):
    monkeypatch.setattr("dlr.measure.logits.ELEMENTS", 97 * 3 * 6)
    model, routing = student
    with Largest() as seen:
        ce, kd = losses(model, routing, INPUTS, POLICY, 1.0)
        (ce.mean() + kd.mean()).backward()
    # of six places and the next one's token, in three texts; weights of the head are 97 x 32 twice at most
    assert 0 < seen.elements <= 97 * 3 * 7 * 2


def test_an_accelerator_holds_what_its_free_memory_allows(monkeypatch):
    from dlr.measure import logits
    assert logits.elements_at_once(torch.device("cpu")) == logits.ELEMENTS
    for free, expected in ((2**20, logits.ELEMENTS), (4 * 2**30, 2**26), (100 * 2**30, logits.MOST)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        assert logits.elements_at_once(torch.device("cuda")) == expected
