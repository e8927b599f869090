"""ShortGPT's order: first the layer that changes its input least."""

import pytest
import torch
import torch.nn.functional as F
from test_ridge import batches

import dlr
from dlr.measure.static import similarity_order
from dlr.routing.config import RouterConfig


@torch.no_grad()
def test_the_order_starts_with_the_layer_whose_output_is_nearest_its_input(llama):
    for place, size in ((2, 1.5), (3, 0.2), (4, 3.0), (5, 0.01)):
        llama.model.layers[place].mlp.down_proj.weight.mul_(20 * size)
        llama.model.layers[place].self_attn.o_proj.weight.mul_(size)
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=1))
    order = similarity_order(llama, routing, batches())
    batch = batches()[0]
    with routing.disabled():
        states = llama(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
        inputs = llama.model.layers[5](states[5], position_embeddings=llama.model.rotary_emb(
            states[5], torch.arange(24)[None]))
    chosen = batch["attention_mask"].bool() & (torch.arange(24) >= 1)
    after = [*states[3:6], inputs]
    near = [F.cosine_similarity(states[2 + unit][chosen], after[unit][chosen], dim=-1).mean().item() for unit in range(4)]
    assert order == sorted(range(4), key=lambda unit: -near[unit]) and order[0] == 3


def test_halves_of_layers_have_no_such_order(llama):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, unit="sublayer"))
    with pytest.raises(ValueError, match="Use unit='layer'"):
        similarity_order(llama, routing, batches())
