"""The predecessor's numbers by hand: means of batch means, and padding that counts as skipped or kept."""

import math

import pandas as pd
import pytest
import torch
from tiny_models import half_skipping

from dlr.measure.evaluate import evaluate, perplexity, skip_ratio
from dlr.measure.paragraphs import counted_by_batches
from dlr.measure.static import plan_without
from dlr.routing.policy import RouterPolicy


def test_the_last_batch_counts_as_much_as_the_others():
    """Nine documents of 10 tokens at 1 nat, and one alone in the last batch, of 2 tokens at 4 nats."""
    table = pd.DataFrame({"doc": range(9), "nll": [10.0] * 8 + [8.0], "predicted": [10] * 8 + [2], "tokens": [11] * 8 + [3],
                          "padding": [0] * 8 + [8], "padding_kept": [0] * 8 + [8], "keep_0": [11] * 8 + [0],
                          "keep_1": [0] * 9})
    found = counted_by_batches(table)
    assert found["perplexity_batches"] == pytest.approx(math.exp((1 + 4) / 2))
    assert perplexity(table) == pytest.approx(math.exp(88 / 82))
    assert found["skip_padded"] == pytest.approx(1 - (88 + 8) / (99 * 2))
    assert skip_ratio(table) == pytest.approx(1 - 88 / (91 * 2))
    one = counted_by_batches(table, batch=9)
    assert one["perplexity_batches"] == pytest.approx(perplexity(table))


def test_gates_at_padding_are_counted_apart(llama, ids):
    routing = half_skipping(llama)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "row": torch.arange(len(ids))}
    table = evaluate(llama, routing, [batch], RouterPolicy(), bar=False)
    gates = routing.plan.gates
    assert table["padding"].tolist() == [5, 0, 0]
    assert table["padding_kept"].tolist() == [float(gates[0, 9:].sum()), 0, 0] and 0 < gates[0, 9:].sum() < 20
    assert counted_by_batches(table)["skip_padded"] == pytest.approx(1 - float(gates.mean()), abs=1e-6)
    assert skip_ratio(table) == pytest.approx(1 - float(gates[mask.bool()].mean()), abs=1e-6)


def test_a_fixed_plan_is_named_by_its_layers(llama, ids):
    routing = half_skipping(llama)                       # layers 2 to 5 are routable
    gates = plan_without(routing, [3, 5]).gates
    assert gates.tolist() == [1, 0, 1, 0]
    with torch.no_grad(), routing.using(plan_without(routing, [3, 5])):
        found = llama(ids).logits
    routing.detach()
    llama.model.layers = torch.nn.ModuleList([layer for place, layer in enumerate(llama.model.layers) if place not in (3, 5)])
    for place, layer in enumerate(llama.model.layers):
        layer.self_attn.layer_idx = place
    llama.config.num_hidden_layers = llama.model.config.num_hidden_layers = 4
    with torch.no_grad():
        assert torch.allclose(found, llama(ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("layers", [[1], [6], [3, 3], [-1]])
def test_a_fixed_plan_of_other_layers_is_refused(llama, layers):
    with pytest.raises(ValueError, match="layers 2 to 5"):
        plan_without(half_skipping(llama), layers)


def test_each_named_layer_is_both_of_its_halves(llama):
    from tiny_models import OPEN
    routing = half_skipping(llama, OPEN.changed(unit="sublayer"))
    assert plan_without(routing, [3]).gates.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
