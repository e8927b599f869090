"""Free-running agreement: the base agrees with itself, what is measured is what plain decoding gives, and plans are held to."""

import numpy as np
import pytest
import torch
from tiny_models import half_skipping, tiny
from transformers import GenerationConfig

import dlr
from dlr.base.models import add_lora
from dlr.measure import logits
from dlr.measure.agreement import MEASURES, agreement, base_texts, paired_difference, summary
from dlr.measure.evaluate import skip_ratio
from dlr.measure.likelihood import kl_to_teacher
from dlr.routing.by_document import RandomByDocument, StaticByDocument
from dlr.routing.config import RouterConfig
from dlr.routing.plan import static_gates, static_pair
from dlr.routing.policy import RandomPlan, RouterPolicy, StaticPlan

pytestmark = pytest.mark.usefixtures("by_rows")

CONFIG = RouterConfig(always_keep=2, keep_first_tokens=0)
TOKENS = 8


@pytest.fixture
def prompts():
    """Two batches, right-padded as `padded_batches` makes them."""
    ids = torch.randint(2, 97, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 3:] = mask[1, 6:] = 0
    return [{"input_ids": ids[:3], "attention_mask": mask[:3], "row": torch.tensor([4, 0, 2])},
            {"input_ids": ids[3:], "attention_mask": mask[3:], "row": torch.tensor([1, 3])}]


def peaked(family="llama"):
    """A tiny model sharp enough that a skipped layer changes its text."""
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def one_by_one(prompts):
    for batch in prompts:
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], batch["row"]):
            yield {"input_ids": ids[None, :int(mask.sum())], "attention_mask": mask[None, :int(mask.sum())],
                   "row": row[None]}


def same(first, second):
    return np.allclose(first, second, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def by_hand(model, ids):
    """Greedy text by whole passes, without cache or `generate`."""
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma3"])
def test_the_base_agrees_with_itself(family, prompts):
    model = peaked(family)
    routing = half_skipping(model, CONFIG)
    table = agreement(model, routing, prompts, None, TOKENS)
    assert table["doc"].tolist() == [0, 1, 2, 3, 4] and table["prompt_tokens"].tolist() == [6, 9, 9, 9, 3]
    assert (table["agreed_tokens"] == TOKENS).all() and (table["agreeing"] == 1).all()
    assert table[["kl", "kl_own_text"]].abs().to_numpy().max() < 1e-6 and skip_ratio(table) == 0


def test_a_router_with_all_gates_open_is_the_base_and_one_that_closes_all_is_not(prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    with routing.at(threshold=-1e9):
        assert summary(agreement(model, routing, prompts, RouterPolicy(), TOKENS))["agreeing_low"] == 1
    with routing.at(threshold=1e9):
        closed = summary(agreement(model, routing, prompts, RouterPolicy(), TOKENS))
    assert closed["skip"] == 1 and closed["agreeing"] == 0 and closed["agreed_tokens"] < TOKENS / 2
    assert closed["kl"] > 0.05 and closed["kl_own_text"] > 0.05
    static = summary(agreement(model, routing, prompts, StaticPlan(torch.zeros(4)), TOKENS))
    assert static == closed


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padding_and_the_batch_do_not_matter(family, prompts):
    model = peaked(family)
    routing = half_skipping(model, CONFIG)
    whole = agreement(model, routing, prompts, RouterPolicy(), TOKENS)
    alone = agreement(model, routing, list(one_by_one(prompts)), RouterPolicy(), TOKENS)
    assert same(whole, alone) and 0.2 < skip_ratio(whole) < 0.8 and (whole["agreeing"] < 1).any()


def test_every_number_is_what_plain_decoding_gives(prompts):
    """Whatever a model's own generation settings say, and although it may choose a token that ends texts."""
    model = peaked()
    model.generation_config = GenerationConfig(repetition_penalty=3.0, eos_token_id=list(range(97)), do_sample=True)
    routing = half_skipping(model, CONFIG)
    table = agreement(model, routing, prompts, RouterPolicy(), TOKENS)
    assert model.generation_config.repetition_penalty == 3.0
    for batch in one_by_one(prompts):
        ids, row = batch["input_ids"], table.loc[int(batch["row"])]
        texts, kept = [], None
        with routing.disabled():
            texts.append(by_hand(model, ids))
        with routing.using(RouterPolicy()):
            texts.append(by_hand(model, ids))
        for name, text in zip(("kl", "kl_own_text"), texts):
            with torch.no_grad():
                student = model(text).logits
                kept = routing.plan.gates[0, ids.shape[1] - 1:-1]
                with routing.disabled():
                    teacher = model(text).logits
            kl = kl_to_teacher(student, teacher, torch.ones_like(text).bool())[ids.shape[1] - 1:]
            assert len(kl) == TOKENS and row[name] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-6)
        equal = (texts[0] == texts[1])[0, ids.shape[1]:].tolist()
        assert row["agreed_tokens"] == (equal + [False]).index(False) and row["agreeing"] == all(equal)
        assert kept.sum(0).tolist() == row.filter(like="keep_").tolist()


@pytest.mark.parametrize("change", [{"execution": "compact"}, {"strategy": "two_pass"}])
def test_how_plans_are_carried_out_does_not_matter(change, prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    masked = agreement(model, routing, prompts, RouterPolicy(), TOKENS)
    with routing.at(**change):
        assert same(masked, agreement(model, routing, prompts, RouterPolicy(), TOKENS))


@pytest.mark.filterwarnings("ignore::dlr.routing.hooks.RunsMasked")
def test_dropped_keys_and_pooled_routers_are_measured_too(prompts):
    for change in ({"kv": "drop"}, {"level": "sequence", "pool_tokens": 4}):
        model = peaked()
        routing = half_skipping(model, CONFIG.changed(**change))
        whole = agreement(model, routing, prompts, RouterPolicy(), TOKENS)
        assert same(whole, agreement(model, routing, list(one_by_one(prompts)), RouterPolicy(), TOKENS))
        assert 0 < skip_ratio(whole) < 1


def test_logits_in_chunks_change_nothing(prompts, monkeypatch):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    whole = agreement(model, routing, prompts, RouterPolicy(), TOKENS)
    monkeypatch.setattr(logits, "ELEMENTS", 97 * 3 * 2)                # two places of three prompts
    assert same(whole, agreement(model, routing, prompts, RouterPolicy(), TOKENS))


def test_a_mixture_of_static_plans_is_its_expected_value(prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    texts = base_texts(model, routing, prompts, TOKENS)
    pair = static_pair([3, 1, 0, 2], 4, 0.3)
    fewer, more = (agreement(model, routing, prompts, StaticPlan(static_gates(4, dropped)), TOKENS, texts=texts)
                   for dropped in ([3], [3, 1]))
    mixed = agreement(model, routing, prompts, StaticByDocument(*pair), TOKENS, texts=texts)
    assert skip_ratio(mixed) == pytest.approx(0.3) and summary(mixed)["tokens"] == TOKENS
    for name in MEASURES:
        assert np.allclose(mixed[name], 0.8 * fewer[name] + 0.2 * more[name])
    paired_difference(mixed, fewer)                                    # of the same prompts, for all its fractions


def test_the_base_is_the_model_without_its_adapter(prompts):
    base = peaked()
    expected = [by_hand(base, batch["input_ids"])[:, 9:] for batch in prompts[1:]]
    model = add_lora(base, rank=4, alpha=8, dropout=0.5, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    routing = half_skipping(model, CONFIG)
    model.train()
    texts = base_texts(model, routing, prompts, TOKENS)
    assert torch.equal(texts[1], expected[0])
    adapted = agreement(model, routing, prompts, None, TOKENS)
    assert skip_ratio(adapted) == 0 and (adapted["agreeing"] == 0).any() and (adapted["kl"] > 0.01).all()
    assert same(adapted, agreement(model, routing, prompts, None, TOKENS, texts=texts))


def test_plans_drawn_by_document_do_not_depend_on_the_batch(prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    whole = agreement(model, routing, prompts, RandomByDocument(0.5), TOKENS)
    assert same(whole, agreement(model, routing, list(one_by_one(prompts)), RandomByDocument(0.5), TOKENS))


def test_summary_and_paired_difference_are_over_prompts(prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    light, heavy = (agreement(model, routing, prompts, StaticPlan(static_gates(4, dropped)), TOKENS)
                    for dropped in ([3], [0, 1, 2, 3]))
    row = summary(light)
    assert row["prompts"] == 5 and row["skip"] == 0.25
    assert all(row[f"{name}_low"] <= row[name] == light[name].mean() <= row[f"{name}_high"] for name in MEASURES)
    difference = paired_difference(heavy, light)
    assert difference["kl"] == pytest.approx(heavy["kl"].mean() - light["kl"].mean()) and difference["kl_low"] > 0
    assert difference["agreed_tokens_high"] <= 0
    assert set(paired_difference(light, light).values()) == {0.0}
    with pytest.raises(ValueError, match="these are of 5 and 4 prompts"):
        paired_difference(light, heavy[:4])
    with pytest.raises(ValueError, match="continued for as many tokens"):
        paired_difference(light, agreement(model, routing, prompts, None, TOKENS - 1))


def test_what_could_not_be_honoured_is_refused(prompts):
    model = peaked()
    routing = half_skipping(model, CONFIG)
    for policy in (RandomPlan(0.5), RouterPolicy(training=True)):
        with pytest.raises(ValueError, match=f"{type(policy).__name__} gives a token other gates"):
            agreement(model, routing, prompts, policy, TOKENS)
    with routing.at(decode_plan="consensus"), pytest.raises(ValueError, match="decode_plan='consensus'"):
        agreement(model, routing, prompts, RouterPolicy(), TOKENS)
    with pytest.raises(ValueError, match="9 tokens and 120 generated ones do not fit the model's context of 128"):
        agreement(model, routing, prompts, None, 120)
    with pytest.raises(ValueError, match="at least one token"):
        agreement(model, routing, prompts, None, 0)
    texts = base_texts(model, routing, prompts, TOKENS)
    with pytest.raises(ValueError, match="what base_texts gave for these 2 batches"):
        agreement(model, routing, prompts, None, TOKENS, texts=texts[:1])
    assert dlr.routing_of(model) is routing
