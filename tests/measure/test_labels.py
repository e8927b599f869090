"""Harm labels are the KL of whole plans, stream to disk, and go on where they stopped."""

import numpy as np
import pytest
import torch
from test_ridge import batches

import dlr
from dlr.measure.evaluate import calibrate_router
from dlr.measure.labels import blocks_as_batches, label_batch, label_in_context, stream
from dlr.measure.likelihood import frozen_base, kl_to_teacher, predicted
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan

DEPTH = RouterConfig(router_class="DepthRouter", always_keep=2, keep_first_tokens=1, skip_adapter_rank=3)


@torch.no_grad()
def test_a_label_is_the_kl_under_its_plan(llama):
    routing = dlr.attach(llama, DEPTH)
    batch = batches()[0]
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    labels = label_batch(llama, routing, batch)
    assert labels.harm.shape == (len(labels), 5) and (labels.harm[:, 0] == 0).all()
    with frozen_base(llama, routing):
        teacher = llama(ids, attention_mask=real.long()).logits
    with routing.using(StaticPlan(routing.router.gates[3])):
        under = llama(ids, attention_mask=real.long()).logits
    expected = torch.zeros(predicted(real).shape)
    expected[predicted(real)] = kl_to_teacher(under, teacher, real)
    chosen = predicted(real)
    chosen[:, 0] = False
    assert torch.allclose(labels.harm[:, 3], expected[chosen], atol=1e-5)
    assert torch.equal(labels.token, ids[:, :-1][chosen].int()) and labels.position.min() == 1
    assert labels.states.shape == labels.last.shape == (len(labels), 32)


@torch.no_grad()
def test_in_context_every_token_has_one_plans_harm(llama):
    routing = dlr.attach(llama, DEPTH)
    with torch.no_grad():
        routing.router.net[-1].weight.normal_(std=1.0)
    calibrate_router(llama, routing, batches(), 0.3)
    generator = torch.Generator().manual_seed(0)
    labels = label_in_context(llama, routing, batches()[0], 0.5, generator)
    known = ~labels.harm[:, 1:].isnan()
    assert (known.sum(1) <= 1).all() and known.any(0).all() and (labels.harm[known.any(1)].nansum(1) > 0).all()


def test_an_interrupted_labelling_goes_on(tmp_path, llama):
    routing = dlr.attach(llama, DEPTH)
    two, calls = batches() * 2, []

    def make(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return label_batch(llama, routing, batch)
    with pytest.raises(KeyboardInterrupt):
        stream(two, make, tmp_path, "labelling")
    labels = stream(two, make, tmp_path, "labelling")
    assert len(calls) == 3 and torch.equal(labels.harm[:len(labels) // 2], labels.harm[len(labels) // 2:])


def test_too_little_text_is_refused():
    blocks = np.arange(48, dtype=np.uint32).reshape(6, 8)
    assert [len(batch["row"]) for batch in blocks_as_batches(blocks, 40, 2)] == [2, 2, 2]
    with pytest.raises(ValueError, match="fewer labels"):
        blocks_as_batches(blocks, 49, 2)
