"""Kept rows attend as all rows would, under attention functions that are not to be had here, too."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SMALL, tiny
from transformers import MistralConfig, MistralForCausalLM
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dlr
from dlr.routing import intercept
from dlr.routing.config import RouterConfig
from dlr.routing.policy import GivenPlan, StaticPlan

pytestmark = pytest.mark.usefixtures("by_rows")
OPEN = RouterConfig(always_keep=2, keep_first_tokens=0)


class Flash:
    """What FlashAttention-2 computes, by its own rules for masks, windows and packed documents; counts its query rows."""

    def __init__(self):
        self.queries = 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, position_ids=None, **kwargs):
        batch, heads, rows, _ = query.shape
        self.queries += rows
        keys = key.shape[2]
        row, column = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)          # the bottom right corner
        mask = (column <= row).expand(batch, 1, rows, keys)
        if sliding_window is not None:
            mask = mask & (column > row - sliding_window)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool() | (column == row)
        elif batch == 1 and position_ids is not None and rows == keys:
            document = (position_ids[0] == 0).cumsum(0)
            mask = mask & (document[:, None] == document)
        shared = heads // key.shape[1]
        return F.scaled_dot_product_attention(query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), attn_mask=mask,
                                              scale=scaling).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch):
    function = Flash()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", function)
    return function


def on_flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"          # as if it had been installed
    return model


def mistral():
    """With a window shorter than the text."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)).eval()


def half(routing, ids, seed=0):
    return GivenPlan((torch.rand(*ids.shape, routing.units, generator=torch.Generator().manual_seed(seed)) > 0.5).float())


@torch.no_grad()
def both(model, policy, ids, **inputs):
    routing, out = dlr.routing_of(model), []
    for execution in ("masked", "compact"):
        with routing.at(policy=policy, execution=execution):
            out.append(model(input_ids=ids, **inputs).logits)
    return out


@pytest.mark.parametrize("make", [tiny, mistral])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_a_flash_base_computes_attention_of_kept_rows_only(make, case, ids, flash):
    model = on_flash(make())
    routing = dlr.attach(model, OPEN, execution="compact")
    inputs = {}
    if case == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 9:] = 0
    if case == "packed":
        ids = ids[:1]
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(ids.shape[1] - 5)])[None]
    masked, compact = both(model, half(routing, ids), ids, **inputs)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    assert torch.allclose(masked[real], compact[real], atol=1e-5)
    flash.queries = 0
    both(model, StaticPlan(torch.zeros(routing.units)), ids, **inputs)
    every = len(model.model.layers) * ids.shape[1]
    assert flash.queries == every + routing.first * ids.shape[1]              # masked: all layers; compact: those that run
    flash.queries = 0
    with routing.at(policy=half(routing, ids), execution="compact"), torch.no_grad():
        model(input_ids=ids, use_cache=False, **inputs)
    assert flash.queries == routing.first * ids.shape[1], "kept rows of routed layers do not go to it"


@torch.no_grad()
def test_a_flash_base_goes_on_from_a_cache(ids, flash):
    model = on_flash(mistral())
    routing = dlr.attach(model, OPEN, execution="compact")
    policy = half(routing, ids)
    out = []
    for execution in ("masked", "compact"):
        with routing.at(policy=GivenPlan(policy.gates[:, :6]), execution=execution):
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        with routing.at(policy=GivenPlan(policy.gates[:, 6:]), execution=execution):
            out.append(model(input_ids=ids[:, 6:], past_key_values=cache).logits)
    assert torch.allclose(*out, atol=1e-5)


def test_soft_caps_and_sinks_stay_with_flash_s_own_code(flash):
    model = on_flash(tiny("gemma2"))
    attention = model.model.layers[0].self_attn
    assert model.config.attn_logit_softcapping and intercept.attention_function(attention) is None
    assert intercept.attention_function(on_flash(tiny()).model.layers[0].self_attn) is flash


@pytest.mark.parametrize("padded", [False, True])
def test_a_flex_base_asks_its_masks_at_kept_rows_places(padded, ids, monkeypatch):
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", lambda *given, training=False, **options:
                        flex.flex_attention(*given, **options))       # its reference: compiling takes a minute here
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", lambda *given, _compile=False, **options:
                        flex.create_block_mask(*given, **options), raising=False)
    model = mistral()
    model.set_attn_implementation("flex_attention")
    routing = dlr.attach(model, OPEN, execution="compact")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    masked, compact = both(model, half(routing, ids), ids, attention_mask=mask)
    assert torch.allclose(masked[mask.bool()], compact[mask.bool()], atol=1e-5)
    rows = []
    own = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", lambda module, query, *rest, **options:
                        (rows.append(query.shape[2]), own(module, query, *rest, **options))[1])
    monkeypatch.setattr("dlr.routing.attention._name_of", lambda own: "flex_attention")
    with routing.at(policy=half(routing, ids), execution="compact"), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert rows[:routing.first] == [ids.shape[1]] * routing.first and max(rows[routing.first:]) < ids.shape[1]
