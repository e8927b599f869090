"""The comparisons rest on these: equal measured skip, signs, text that is held out, and a base that is given back."""

import json
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dlr
from dlr.base.corpus import split_of
from dlr.base.data import load_documents
from dlr.base.find import find_checkpoint
from dlr.base.folder import missing_part
from dlr.base.models import NANO
from dlr.figures.training import comparison, keep_rates, training
from dlr.measure import evaluate
from dlr.routing.plan import static_pair
from dlr.routing.policy import RouterPolicy, StaticPlan
from dlr.runs import KINDS, kind_of
from dlr.train import prepare
from dlr.train.settings import RunConfig
from dlr.train.trainer import DLRTrainer
from dlr.train.validation import Validation, validation_batches
from dlr.workbook import frontier, study

WORDS = "the a cat dog house tree runs sees under over with and red blue old small water light".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with a real tokenizer, and 400 documents of which each says its number in every line."""
    place, rng = tmp_path_factory.mktemp("study"), random.Random(0)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                                 num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
                     ).save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(NANO).save_pretrained(place / "base")
    (place / "texts").mkdir()
    for number in range(10000, 10400):
        line = f" [{number}] " + " ".join(rng.choice(WORDS) for _ in range(6))
        (place / "texts" / f"{number}.txt").write_text(line * 8)
    return place


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr(prepare, "cache_folder", lambda: place)
        yield


def settings(folder, **changes) -> RunConfig:
    return RunConfig(**{"model": str(folder / "base"), "dataset": str(folder / "texts"), "bf16": False, "always_keep": 2,
                        "keep_first_tokens": 4, "seq_len": 16, "eval_len": 32, "batch_size": 4, "steps": 2, "lora_rank": 2,
                        "router_hidden": 16, "skip_adapter_rank": 2, "adapter_tokens": 256, "order_tokens": 64,
                        "candidates": 2, "label_tokens": 256, "label_batch": 64, "visits": 2000,
                        "calibration_docs": 12, "eval_docs": 40, "target_skip": 0.4} | changes)


def settings_of(bench, **changes) -> RunConfig:
    return bench.config.model_copy(update=changes)


@pytest.fixture(scope="module")
def bench(folder):
    return study.open_bench(settings(folder))


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    """A trained router with its controls, the static plan, the baselines and the base."""
    place, config = tmp_path_factory.mktemp("runs"), bench.config
    before = {name: p.clone() for name, p in bench.base.named_parameters()}
    variant = study.train(bench, "DLR", config, place / "router")
    found = study.routed_rows(bench, variant)
    variant.close()
    found += [study.static_row(bench, config, place / "static", found[0]["skip"]), study.base_row(bench),
              study.dense_row(bench, config, place / "dense"),
              *study.stochastic_rows(bench, settings_of(bench, layer_drop=0.5), place / "drop", [0.3])]
    after = dict(bench.base.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {row["variant"]: row for row in found}


def test_random_token_plans_are_trained_and_named(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BOOTSTRAP", 20)
    config = settings_of(bench, layer_drop=0.6, drop_level="token")
    rows = study.stochastic_rows(bench, config, tmp_path, [0.3])
    assert [row["variant"] for row in rows] == ["random token plans, full", "random token plans, 30% dropped"]
    assert {row["kind"] for row in rows} == {"stochastic"}
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["skip"].between(0.25, 0.6).all(), "three quarters of the tokens are free, and drop 60 %"
    again = dlr.load(tmp_path / "checkpoint", model=bench.base)
    assert again.kind == "stochastic" and again.policy.skip == 0.6
    again.routing.detach()
    again.model.unload()


def numbers(tokenizer, ids) -> set[int]:
    """The documents whose numbers can be read in token ids."""
    return {int(n) for n in re.findall(r"\[(\d{5})\]", tokenizer.decode(ids))}


def of_split(bench, split: str) -> set[int]:
    return {int(re.search(r"\d{5}", text)[0]) for text in load_documents(bench.config.dataset, split).texts}


def test_router_and_controls_skip_as_much_as_the_router_did(rows):
    """Measured, with the forced first tokens: an eighth of every document here, which no plan can skip."""
    routed = rows["DLR"]
    assert routed["skip"] == pytest.approx(0.4, abs=0.05)
    for name, tolerance in (("DLR, shuffled", 1e-9), ("DLR, mean plan", 1e-6), ("best static", 1e-6), ("DLR, random plan", 0.02)):
        assert rows[name]["skip"] == pytest.approx(routed["skip"], abs=tolerance), name
    assert rows["stochastic depth, 30% dropped"]["skip"] == pytest.approx(0.3, abs=0.02)
    assert all(rows[name]["skip"] == 0 for name in ("base", "dense LoRA", "stochastic depth, full"))
    own, mean = routed["keep_rate"], rows["DLR, mean plan"]["keep_rate"]
    assert all(mean[i] <= mean[j] for i in range(4) for j in range(4) if own[i] < own[j]), "it drops what the router keeps least"
    assert routed["active_layers"] == pytest.approx(2 + 4 * (1 - routed["skip"]))


def test_rows_say_what_they_are_apart_from_their_names(rows):
    kinds = {name: (row["kind"], row["of"]) for name, row in rows.items()}
    assert kinds["DLR"] == ("routed", "DLR") and kinds["DLR, shuffled"] == ("shuffled", "DLR")
    assert {kind for kind, _ in kinds.values()} == set(KINDS)
    with pytest.raises(ValueError, match="kind='router' is not one of"):
        study.row_of(None, study.Variant("x", None, None, None), "x", pd.DataFrame(), "router")
    old = pd.DataFrame([{"variant": name} for name in ("v1, mean plan", "cold", "stochastic depth, full", "best static")])
    assert [kind_of(row) for row in old.to_dict("records")] == ["mean", "routed", "stochastic", "static"]
    assert kind_of({"variant": "a router against the base", "kind": "routed"}) == "routed"


def test_differences_have_the_signs_their_docstrings_give(bench, rows):
    """A plan that drops every layer is worse than one that drops none, on a base model that has learnt something."""
    nano = study.open_bench(RunConfig(bf16=False, eval_len=32, eval_docs=6, calibration_docs=2, router_class="Router",
                                      warm_start=False))
    routing = study.attach(nano.base, nano.config.router())
    variant = study.Variant("DLR", nano.config, nano.base, routing)
    good, bad = StaticPlan(torch.ones(12)), StaticPlan(torch.zeros(12))
    for routed, static, sign in ((good, bad, -1), (bad, good, 1)):
        study.measure(nano, variant, "DLR", routed)
        study.measure(nano, variant, "best static", static, "static")
        verdict = frontier.against_static(nano, "DLR")
        assert sign * verdict["low"] > 0 and sign * verdict["high"] > 0 and sign * verdict["nll_difference"] > 1
    routing.router.net[-1].bias.data.fill_(4.0)                             # every gate open: what a good router is
    def shuffled_badly(policy, routing, hidden, current):
        return torch.zeros(*hidden.shape[:2], routing.units), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.ShuffledPlan, "__call__", shuffled_badly)
        found = study.routed_rows(nano, variant)
    assert found[1]["against_router"]["low"] > 1, "positive: the router wins"
    assert frontier.against_static(nano, "another") is None
    with pytest.raises(ValueError, match="same documents"):
        study.paired_difference(nano.tables["DLR"], bench.tables["DLR"])


def test_the_forced_share_is_that_of_the_first_tokens(bench):
    lengths = [int(n) for batch in bench.test for n in batch["attention_mask"].sum(1)]
    assert study.forced_share(bench, 4) == pytest.approx(sum(min(4, n) for n in lengths) / sum(lengths))
    assert study.forced_share(bench, 0) == 0 and study.forced_share(bench, 10**6) == 1
    static = static_pair([0, 1, 2, 3], 4, 1 - study.forced_share(bench, 4), study.forced_share(bench, 4))
    assert static[1].sum() == 0 and static[2] == pytest.approx(1.0), "a router that closes all it can has its static twin"


def test_text_for_measuring_is_read_by_nothing_else(bench, tmp_path, monkeypatch):
    test, calibration, train = (of_split(bench, split) for split in ("test", "calibration", "train"))
    assert not test & calibration and not test & train and not calibration & train
    assert all(split_of(text) == "test" for text in load_documents(bench.config.dataset, "test").texts)
    def read(batches):
        return set().union(*(numbers(bench.tokenizer, ids) for batch in batches for ids in batch["input_ids"]))
    assert read(bench.test) <= test and read(bench.calibration) <= calibration
    validation = of_split(bench, "validation")
    assert read(validation_batches(bench.config, bench.tokenizer)) <= validation and not validation & (test | calibration | train)
    assert validation_batches(settings_of(bench, eval_steps=0), bench.tokenizer) is None
    blocks = bench.blocks(settings_of(bench, steps=100))
    seen = {n for i in range(len(blocks)) for n in numbers(bench.tokenizer, blocks[i]["input_ids"])}
    assert len(seen) > 50 and seen <= train
    searched = []

    def search(model, routing, batches, candidates, kept):
        searched.extend(batches)
        kept.write_text("")
        return [0, 1, 2, 3]
    monkeypatch.setattr(prepare, "greedy_order_by_kl", search)
    monkeypatch.setattr(prepare, "cache_folder", lambda: tmp_path)
    (tmp_path / "prepared").mkdir()
    study.best_static_order(bench)
    assert searched and read(searched) <= train, "what an order is found on, nothing is measured on"
    assert sum(batch["input_ids"].numel() for batch in searched) == 64


def test_a_static_order_is_searched_anew_wherever_it_could_differ(bench, folder, tmp_path, monkeypatch):
    searches = []

    def search(model, routing, batches, candidates, kept):
        searches.append(routing.bf16)
        kept.write_text("")
        return list(range(routing.units))
    monkeypatch.setattr(prepare, "greedy_order_by_kl", search)
    monkeypatch.setattr(prepare, "cache_folder", lambda: tmp_path)
    (tmp_path / "prepared").mkdir()

    def count(**changes) -> int:
        """Searches in all, once an order for these settings has been asked for by a new bench."""
        config = settings(folder, **{"skip_adapter_rank": 0} | changes)
        study.best_static_order(study.open_bench(config))
        return len(searches)
    assert count() == 1 and count() == 1, "kept in the cache folder"
    assert count(steps=9, lr=0.5, target_skip=0.2, batch_size=3, seed=5) == 1, "nothing that it depends on"
    kinds = {"always_keep": 1, "keep_last": 1, "unit": "sublayer", "keep_first_tokens": 0, "kv": "drop", "seq_len": 8,
             "order_tokens": 96, "candidates": 3, "skip_adapter_rank": 2, "dtype": "bfloat16", "bf16": True}
    for expected, (name, value) in enumerate(kinds.items(), 2):
        assert count(**{name: value}) == expected, name
    other = study.open_bench(settings(folder, skip_adapter_rank=0))
    with torch.no_grad():
        for parameter in other.base.parameters():
            parameter.mul_(1.5)
    study.best_static_order(other)
    assert len(searches) == len(kinds) + 2, "another model under the same name"
    shorter = settings(folder, keep_last=1)
    assert len(study.best_static_order(bench, shorter)) == 3, "a variant's own shape, not the bench's"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_training_gives_the_base_back(bench, tmp_path, monkeypatch, stop):
    @torch.no_grad()
    def logits():
        return bench.base(bench.test[0]["input_ids"]).logits

    def stopped(trainer):
        raise stop()
    dense = logits()
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(DLRTrainer, "fit", stopped)
        study.train(bench, "DLR", bench.config, tmp_path / "a")
    assert torch.equal(logits(), dense) and bench.open is None
    study.train(bench, "DLR", settings_of(bench, warm_start=False), tmp_path / "b")
    with pytest.warns(UserWarning, match="'DLR' was still on the base"):     # the cell that would close it was stopped
        row = study.base_row(bench)
    assert torch.equal(logits(), dense) and row["skip"] == 0 and bench.open is None


def test_stochastic_depth_without_any_is_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="layer_drop above 0"):
        study.stochastic_rows(bench, bench.config, tmp_path, [0.2])


def test_layer_numbers_in_figures_are_the_models(rows):
    """Of any subset of variants, also of none that was routed; with sublayer units a layer has two columns."""
    table = list(rows.values())
    labels = [t.get_text() for t in keep_rates(table, 2).axes[0].get_xticklabels()]
    assert labels == ["2", "3", "4", "5"]
    halves = [row | {"unit": "sublayer", "keep_rate": [0.5] * 8} for row in table]
    labels = [t.get_text() for t in keep_rates(halves, 2).axes[0].get_xticklabels()]
    assert labels == ["2 attention", "2 MLP", "3 attention", "3 MLP", "4 attention", "4 MLP", "5 attention", "5 MLP"]
    assert comparison([row for row in table if row["kind"] == "dense"])
    assert keep_rates(table[:0], 2) is None and training({}) is None


def test_routed_rows_measure_the_router_that_was_saved(bench, rows, tmp_path):
    """The row's skip is that of the calibrated router, run anew."""
    variant = study.train(bench, "DLR", bench.config, tmp_path / "again")
    table = study.evaluate(variant.model, variant.routing, bench.test, RouterPolicy())
    assert 1 - np.mean(rows["DLR"]["keep_rate"]) == pytest.approx(study.summary(table, 2)["skip"], abs=1e-3)
    assert rows["DLR"]["perplexity"] == pytest.approx(study.summary(table, 2)["perplexity"], rel=1e-4)
    variant.close()


def test_text_that_cannot_be_validated_on_is_refused_before_the_preparation(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "prepare", lambda *_: pytest.fail("prepared in vain"))
    assert bench.config.is_prepared
    with pytest.raises(ValueError, match="no split 'validation'.*Or set eval_steps=0"):
        study.train(bench, "DLR", settings_of(bench, lines=5), tmp_path / "router")
    assert not (tmp_path / "router").exists() and bench.open is None


def test_the_best_state_is_a_checkpoint_of_its_own_and_no_variant_is_found_by_it(bench, tmp_path, monkeypatch):
    """Calibrated as the last one is; of a control it is a control's. What has no name of its own is the last."""
    losses = iter([1.0, 2.0] * 3)
    monkeypatch.setattr(Validation, "__call__", lambda *_: {"val_ce": next(losses), "val_skip": 0.4})
    config = settings_of(bench, eval_steps=1, target_skip=0.3)
    variant = study.train(bench, "DLR", config, tmp_path / "router")
    records = [json.loads((tmp_path / "router" / name / "router_config.json").read_text()) for name in ("best", "checkpoint")]
    assert [record["calibrated_skip"] for record in records] == pytest.approx([0.3, 0.3], abs=0.02)
    best, last = (load_file(tmp_path / "router" / name / "adapter_model.safetensors") for name in ("best", "checkpoint"))
    held = {name: parameter for name, parameter in variant.model.state_dict().items() if "lora_" in name}
    for name, weight in last.items():
        assert torch.equal(weight, held[name.replace(".weight", ".default.weight")])
    assert any(not torch.equal(best[name], last[name]) for name in last)
    variant.close()
    study.train_static(bench, "best static", config, tmp_path / "static", [2, 0, 3, 1], 0.3).close()
    for place in ("router", "static"):
        assert find_checkpoint(tmp_path / place) == tmp_path / place / "checkpoint"
        assert missing_part(tmp_path / place / "best") is None, "whole"
    assert (tmp_path / "static" / "best" / "control.json").is_file()
    assert not list((tmp_path / "static" / "best").glob("router_config.json"))
