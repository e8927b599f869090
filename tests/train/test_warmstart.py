"""Marginal-harm labels mean what they say, and the warm router starts no worse than the plan it is shrunk to."""

import pytest
import torch
from test_training import Rows
from tiny_models import tiny

import dlr
from dlr.base.models import add_lora
from dlr.measure.likelihood import frozen_base, kl_to_teacher
from dlr.routing.policy import StaticPlan
from dlr.train.settings import RunConfig
from dlr.train.warmstart import (SHARES, SHRINK_BATCHES, Background, HarmLabels, label, label_batch,
                                 regress, shrink, warm_start)

CONFIG = RunConfig(always_keep=2, keep_first_tokens=1, warm_tokens=64, warm_epochs=4, batch_size=4, seq_len=12,
                   bf16=False, target_skip=0.5, lora_rank=2)


class Blocks(Rows):
    def __init__(self, count=64):
        super().__init__(count, equal=True)


def routed(idle=None):
    model = tiny()
    if idle is not None:
        with torch.no_grad():
            for part in (model.model.layers[idle].self_attn.o_proj, model.model.layers[idle].mlp.down_proj):
                part.weight.zero_()
    model = add_lora(model, rank=2)
    return model, dlr.attach(model, CONFIG.router())


def test_an_idle_layer_does_no_harm_and_the_rest_does():
    model, routing = routed(idle=4)
    labels = label(model, routing, Blocks(), CONFIG, 0, None)
    assert labels.harm.shape == (len(labels.states), 4) and labels.states.shape[1] == 32
    assert labels.harm[:, 2].abs().max() < 1e-5 < labels.harm[:, 0].abs().mean()


def test_on_an_open_background_the_label_is_the_kl_of_skipping_one_layer():
    model, routing = routed()
    ids = torch.stack([row["input_ids"] for row in Blocks(4).rows])
    labels = label_batch(model, routing, ids, lambda hidden: torch.ones(*hidden.shape[:2], 4))
    real = torch.ones_like(ids).bool()
    with frozen_base(model, routing):
        teacher = model(input_ids=ids).logits
    gates = torch.ones(4)
    gates[1] = 0
    with torch.no_grad(), routing.using(StaticPlan(gates)):
        expected = kl_to_teacher(model(input_ids=ids).logits, teacher, real).view(4, 11)[:, 1:].flatten()
    assert torch.allclose(labels.harm[:, 1], expected, atol=1e-5)


def test_backgrounds_are_random_static_or_the_routers_own():
    _, routing = routed()
    hidden = torch.randn(64, 12, 32)
    static = Background(routing, 0.5, 0, [3, 1, 0, 2], seed=0)(hidden)
    assert static[..., 3].mean() < 0.2 and static[..., 2].mean() > 0.8
    assert Background(routing, 0.5, 0, None, seed=0)(hidden).mean() == pytest.approx(0.5, abs=0.08)
    own = Background(routing, 0.5, 1, None, seed=0)(hidden)
    assert own.mean() == pytest.approx(0.9, abs=0.03)           # a keep-biased router, a tenth flipped


def test_regression_finds_harm_that_the_state_tells():
    _, routing = routed()
    states = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    harm = states[:, :4].relu() + torch.tensor([0.0, 0.5, 1.0, 1.5])
    assert regress(routing, HarmLabels(states, harm), 30, seed=0) > 0.5


def test_shrinking_keeps_the_static_order_and_meets_the_target():
    model, routing = routed()
    blocks, order = Blocks(), [3, 1, 0, 2]
    labels = label(model, routing, blocks, CONFIG, 0, None, order)
    regress(routing, labels, 4, 0)
    assert shrink(model, routing, blocks, labels, order, CONFIG) in SHARES
    logits = routing.router(labels.states)
    assert (logits <= routing.calibration.threshold).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert logits.mean(0).argsort().tolist() == order


class Noted(Blocks):
    """Blocks that note which of them were read."""

    def __init__(self, count):
        super().__init__(count)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [64, 24])
def test_the_share_of_token_dependence_is_chosen_on_blocks_that_no_label_came_from(count):
    """Also where the text is so short that labels are taken from it more than once."""
    model, routing = routed()
    blocks, order = Noted(count), [3, 1, 0, 2]
    pool = [label(model, routing, blocks, CONFIG, round_index, None, order) for round_index in (0, 1)]
    labelled, blocks.read = set(blocks.read), []
    shrink(model, routing, blocks, pool[0], order, CONFIG)
    assert len(labelled) >= 8 and len(set(blocks.read)) == SHRINK_BATCHES * CONFIG.batch_size
    assert not labelled & set(blocks.read) and max(blocks.read) == count - 1
    with pytest.raises(ValueError, match="holds 16 blocks of 12 tokens; a warm start needs 20"):
        label(model, routing, Blocks(16), CONFIG, 0, None, order)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_labelling_that_stops_leaves_no_hook(stop):
    model, routing = routed()
    def stopped(*args):
        raise stop()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    handle = routing.layers[4].register_forward_pre_hook(stopped)
    with pytest.raises(stop):
        label_batch(model, routing, torch.zeros(1, 8, dtype=torch.long), None)
    handle.remove()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


def test_labels_are_cached_and_the_whole_is_repeatable(tmp_path):
    found = []
    for folder in (tmp_path, tmp_path, None):
        torch.manual_seed(0)
        model, routing = routed()
        found.append((warm_start(model, routing, Blocks(), CONFIG, folder, [3, 1, 0, 2]), routing.calibration.threshold))
    assert found[0] == found[1] == found[2]
    assert {p.name for p in tmp_path.iterdir()} == {"harm-0.safetensors", "harm-1.safetensors"}
    assert set(found[0][0]) == {"warm_start_explained_variance", "token_dependent_share"}
