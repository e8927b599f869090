"""One depth router at every budget beside healed static plans; adapters, order and labels are made once."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_study import _cache, folder, settings  # noqa: F401  fixtures, and the settings that go with them

import dlr
from dlr.base.data import Documents, load_documents
from dlr.routing.attach import attach
from dlr.runs import Run
from dlr.train import prepare as prepared
from dlr.train.trainer import DLRTrainer
from dlr.workbook import depth_study, domain_study, frontier, stages, study
from dlr.workbook.phases.depth_router import DepthRouterConfig
from dlr.workbook.phases.training import ParetoConfig

DEPTH = {"router_class": "DepthRouter", "router_hidden": 16, "skip_adapter_rank": 2, "adapter_tokens": 1024,
         "order_tokens": 1024, "label_tokens": 2048, "visits": 2000, "elastic": True, "lora_prefix": False, "steps": 3}


@pytest.fixture(scope="module")
def bench(folder):  # noqa: F811
    return study.open_bench(settings(folder, **DEPTH))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("frontier")


@pytest.fixture(scope="module")
def rows(bench, place):
    variant = study.train(bench, "DLR", bench.config, place / "router")
    rows = frontier.routed_frontier(bench, variant, [0.2, 0.5])
    variant.close()
    skips = {row["target_skip"]: row["skip"] for row in rows if row["kind"] == "routed"}
    return rows + frontier.static_frontier(bench, bench.config, place / "static", skips)


def test_one_router_meets_every_budget_and_controls_its_skip(bench, rows):
    named = {row["variant"]: row for row in rows}
    for asked in (0.2, 0.5):
        routed = named[f"DLR at {asked:.0%}"]
        assert routed["skip"] == pytest.approx(asked, abs=0.05) and routed["target_skip"] == asked
        for control, tolerance in ((f"DLR at {asked:.0%}, shuffled", 1e-9), (f"DLR at {asked:.0%}, mean plan", 1e-6),
                                   (f"best static at {asked:.0%}", 1e-6), (f"DLR at {asked:.0%}, random plan", 0.03)):
            assert named[control]["skip"] == pytest.approx(routed["skip"], abs=tolerance), control
            assert named[control]["adapter_parameters"] == routed["adapter_parameters"] == 4 * (2 * 2 * 32 + 2), control
            assert bool(named[control]["router_parameters"]) == control.endswith("shuffled"), control
    found = frontier.differences(bench, "DLR", "best static", [0.2, 0.5, 0.7])
    assert [row["target_skip"] for row in found] == [0.2, 0.5] and all(row["low"] <= row["high"] for row in found)


def test_checkpoints_bring_book_and_adapters_back(bench, rows, place):
    base = bench.base
    routed = dlr.load(place / "router" / "checkpoint", model=base, skip=0.5)
    order = routed.routing.router.order.tolist()
    with torch.no_grad():
        routed.model(torch.randint(2, 97, (2, 16)))
    book = {tuple(gates) for gates in routed.routing.router.gates.int().tolist()}
    assert {tuple(row) for row in routed.routing.plan.gates[:, 4:].flatten(0, 1).int().tolist()} <= book
    routed.routing.detach()
    routed.model.unload()
    static = dlr.load(place / "static" / "checkpoint", model=base)
    assert static.order == order and any(up.abs().sum() > 0 for up in static.routing.router.skip.up)
    first = order[0]                                                        # dropped by every plan but the dense one
    trained, fitted = static.routing.router.skip.up[first], adapters(bench)[f"up.{first}"]
    assert not torch.equal(trained, fitted), "adapters are trained with LoRA"
    assert torch.allclose(trained, fitted, atol=0.1), "from their closed form on"
    static.routing.detach()
    static.model.unload()


def adapters(bench):
    return prepared.Preparer(bench.base, bench.tokenizer, bench.config).adapters()


def test_what_is_prepared_once_is_read_again(bench, rows, monkeypatch):
    monkeypatch.setattr(prepared, "fit_skip_adapters", None)
    monkeypatch.setattr(prepared, "greedy_order_by_kl", None)
    monkeypatch.setattr(prepared, "label_batch", None)
    first = bench.preparation(bench.config, labels=True)
    assert len(first.labels) >= 2048 * 0.6 and sorted(first.order) == [0, 1, 2, 3]
    fewer = bench.preparation(bench.config.changed(label_tokens=1024), labels=True)
    assert torch.equal(fewer.labels.harm, first.labels.harm[:len(fewer.labels)]), "labels can be added to"
    with pytest.raises(TypeError):                                          # another rank is other adapters
        bench.preparation(bench.config.changed(skip_adapter_rank=3), labels=False)


def test_an_unfinished_run_does_not_train_a_variant_again(bench, rows, tmp_path, monkeypatch):
    run, weights = Run(tmp_path), []
    run._started = 0
    for _ in range(2):
        variant = study.train(bench, "DLR", bench.config, run.folder / "router")
        weights.append({name: each.detach().clone() for name, each in variant.model.named_parameters()
                        if each.requires_grad})
        variant.close()
        monkeypatch.setattr(DLRTrainer, "compute_loss", None)
    assert weights[0] and all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    run.finish([])
    assert not (tmp_path / "router" / "trainer").exists() and (tmp_path / "router" / "checkpoint").is_dir()


def test_a_router_is_trained_end_to_end_at_every_price(bench, rows, place, tmp_path):
    variant = study.train(bench, "DLR", bench.config.changed(router_share=1.0), tmp_path / "router")
    routing = variant.routing
    variant.close()
    regressed = load_file(place / "router" / "checkpoint" / "router.safetensors")
    trained = {name: tensor for name, tensor in routing.router.weights().items() if name.startswith("net.")}
    assert all(not torch.equal(tensor, regressed[name]) for name, tensor in trained.items())
    assert routing.calibration.curve == sorted(routing.calibration.curve)
    log = pd.read_csv(tmp_path / "router" / "log.csv")
    assert log["temperature"].notna().all() and log["skip"].between(0.01, 0.9).all()


def test_independent_gates_get_the_same_adapters(bench, rows, tmp_path):
    config = bench.config.changed(router_class="Router", warm_start=False, elastic=False)
    variant = study.train(bench, "v0", config, tmp_path / "router")
    adapters = variant.routing.router.skip
    variant.close()
    assert len(adapters.up) == 4 and all(up.abs().sum() > 0 for up in adapters.up)


class Kept:
    """A run that keeps its metrics to itself."""

    def __init__(self, folder=None):
        self.folder = folder

    def finish(self, rows, **more):
        return {"rows": rows} | more


def test_the_dial_is_what_the_router_measures(bench, rows, place):
    variant = study.train(bench, "DLR", bench.config, place / "dialled")
    told = {row["asked"]: row["skip"] for row in frontier.dial(bench, variant)}
    variant.close()
    assert list(told) == list(frontier.DIAL) and sorted(told.values()) == list(told.values())
    measured = {row["target_skip"]: row["skip"] for row in rows if row["kind"] == "routed"}
    assert all(told[asked] == pytest.approx(skip, abs=1e-6) for asked, skip in measured.items())


def test_stages_follow_one_another_at_every_budget(bench, rows, tmp_path):
    config = bench.config.changed(context_tokens=256)
    object.__setattr__(config, "budgets", [0.3])
    object.__setattr__(config, "learning_share", 1.0)
    metrics = stages.measure_stages(bench, config, Kept(tmp_path))
    found = {row["stage"]: row for row in metrics["rows"]}
    assert set(found) == set(stages.STAGES)
    assert found["closed form"]["skip"] == pytest.approx(found["regressed"]["skip"], abs=1e-6)
    assert [(row["before"], row["stage"]) for row in metrics["gains"]] == list(
        zip(stages.STAGES, stages.STAGES[1:]))
    assert all(row["low"] <= row["nll_difference"] <= row["high"] for row in metrics["gains"])
    ends = [load_file(tmp_path / name / "checkpoint" / "router.safetensors")["net.0.weight"]
            for name in ("healed", "end-to-end")]
    assert not torch.equal(*ends), "the last stage trains the router"


def test_a_domain_has_a_static_plan_of_its_own(bench, rows, monkeypatch):
    documents = {split: load_documents(bench.config.dataset, split) for split in ("train", "test")}
    marked = {split: Documents(its.source, split, its.texts, its.hash, ["odd" if place % 2 else "even"
                               for place in range(len(its))]) for split, its in documents.items()}
    monkeypatch.setattr(domain_study, "load_documents", lambda dataset, split: marked[split])
    config = DepthRouterConfig(**bench.config.model_dump()).changed(budgets=[0.3, 0.5], order_tokens=128)
    routing = attach(bench.base, config.router())
    try:
        bench.preparation(bench.config, labels=False)
        prepared.Preparation({}, [3, 1, 0, 2]).install(routing)
        table = domain_study.static_by_domain(bench, routing, config)
        assert routing.router.order.tolist() == [3, 1, 0, 2], "the router's own book is put back"
    finally:
        routing.detach()
    seen = sorted(row for batch in bench.test for row in batch["row"].tolist())
    assert sorted(table[table["budget"] == 0.3]["document"]) == seen
    sums = table.groupby("budget")["static by domain"].sum()
    assert 0 < sums[0.3] < sums[0.5]


def test_the_study_before_healing_compares_all_plans(bench, rows):
    config = DepthRouterConfig(**bench.config.model_dump()).changed(
        budgets=[0.3], label_counts=[256, 10**6], scaling_batches=1, context_tokens=1024)
    metrics = depth_study.measure(bench, config, Kept())
    plans = {row["plan"]: row["kl"] for row in metrics["rows"]}
    assert set(plans) == {"static", "shuffled", "oracle", "depth router", "in context", "position alone",
                          "token alone", "privileged"}
    assert plans["oracle"] == min(plans.values())
    assert [row["labels"] for row in metrics["scaling"]] == [256, metrics["labels"]]


def test_a_router_that_is_there_is_measured_and_not_trained(bench, rows, place, monkeypatch):
    monkeypatch.setattr(study, "DLRTrainer", None)
    config = bench.config.changed(steps=1)
    for name, value in (("budgets", [0.2, 0.5]), ("checkpoint", str(place / "router" / "checkpoint"))):
        object.__setattr__(config, name, value)
    metrics = frontier.measure_checkpoint(bench, config, Kept())
    found = {row["variant"]: row for row in metrics["rows"]}
    assert found["base"]["skip"] == 0 and [row["asked"] for row in metrics["dial"]] == list(frontier.DIAL)
    for row in rows:
        if row["kind"] in ("routed", "shuffled", "random", "mean"):
            assert found[row["variant"]]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-4), row["variant"]
    with pytest.raises(ValueError, match="give both"):
        ParetoConfig(point="checkpoint")


def test_a_domain_has_its_difference_and_the_skip_of_the_router_there(monkeypatch):
    """What a domain skips differs at one price; weighted by tokens it is the whole's."""
    domains = ["prose", "code", "prose", "code"]
    tokens = [10, 20, 10, 40]
    routed = pd.DataFrame({"doc": range(4), "nll": [20.0, 30, 20, 60], "predicted": tokens, "tokens": tokens,
                           "keep_0": [10, 5, 10, 10], "keep_1": [5, 5, 5, 10]})
    tables = {"DLR at 40%": routed, "best static at 40%": routed.assign(nll=routed["nll"] + tokens)}
    bench = SimpleNamespace(config=SimpleNamespace(dataset="x"), tables=tables)
    monkeypatch.setattr(frontier, "load_documents", lambda *_: Documents("x", "test", [""] * 4, "", domains))
    rows = {row["domain"]: row for row in frontier.by_domain(bench, "DLR", "best static", [0.4])}
    assert {name: row["skip"] for name, row in rows.items()} == pytest.approx({"prose": 0.25, "code": 0.75})
    assert all(row["nll_difference"] == pytest.approx(-1.0) and row["target_skip"] == 0.4 for row in rows.values())
    assert (20 * 0.25 + 60 * 0.75) / 80 == pytest.approx(frontier.skip_ratio(routed))
