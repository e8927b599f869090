"""Peers are trained and measured as every variant, on the same base, and each meets its budget."""

import pytest
import torch
from test_study import _cache, folder, settings  # noqa: F401  fixtures, and the settings that go with them

from dlr.train import prepare as prepared
from dlr.workbook import peers, study

ADAPTED = {"router_class": "DepthRouter", "router_hidden": 16, "skip_adapter_rank": 2, "adapter_tokens": 512,
           "order_tokens": 64, "candidates": 2, "label_tokens": 64, "steps": 2}


@pytest.fixture(scope="module")
def bench(folder):  # noqa: F811
    return study.open_bench(settings(folder, **ADAPTED))


@pytest.mark.filterwarnings("ignore:Plans run masked")
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_trains_and_meets_its_budget_on_unseen_text(bench, name, tmp_path):
    before = {key: tensor.clone() for key, tensor in bench.base.named_parameters()}
    config = bench.config.changed(**peers.PEERS[name])
    fresh = study.fresh_variant(bench, name, config)
    start = {key: tensor.clone() for key, tensor in fresh.routing.router.named_parameters()}
    fresh.close()
    variant = study.train(bench, name, config, tmp_path)
    moved = [key for key, tensor in variant.routing.router.named_parameters() if not torch.equal(tensor, start[key])]
    assert len(moved) == len(start), "two steps have moved every weight"
    rows = {row["kind"]: row for row in study.routed_rows(bench, variant)}
    variant.close()
    assert rows["routed"]["skip"] == pytest.approx(0.4, abs=0.05)
    assert rows["mean"]["skip"] == pytest.approx(rows["routed"]["skip"], abs=1e-6)
    assert ("causal" in rows["routed"]) == (name == "MoD") and rows["routed"].get("causal", True) == (name != "MoD")
    after = dict(bench.base.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_rate_that_was_set_is_the_variants_too(bench):
    assert peers.of_variant(bench.config, "v2").router_lr == 1e-2
    assert peers.of_variant(bench.config.changed(router_lr=3e-5), "v2").router_lr == 3e-5


def test_what_is_prepared_is_that_of_plain_paths(bench, monkeypatch, tmp_path):
    """Soft weights of an untrained rule must not come into the order and adapters that all arms share."""
    routers, attach = [], prepared.attach
    monkeypatch.setattr(prepared, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(prepared, "attach", lambda *args, **options: routers.append(attach(*args, **options)) or routers[-1])
    config = bench.config.changed(**peers.PEERS["FlexiDepth"])
    made = prepared.prepare(bench.base, bench.tokenizer, config, labels=False)
    assert sorted(made.order) == [0, 1, 2, 3] and {type(each.router).__name__ for each in routers} == {"Router"}


def test_shortgpt_is_a_static_row_at_the_skip_asked_for(bench, tmp_path):
    row = peers.shortgpt_row(bench, bench.config, tmp_path, 0.35)
    assert row["variant"] == "ShortGPT" and row["kind"] == "static" and sorted(row["order"]) == [0, 1, 2, 3]
    assert row["skip"] == pytest.approx(0.35, abs=1e-6)
