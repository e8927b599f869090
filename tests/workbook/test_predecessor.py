"""The predecessor's protocol, end to end on a tiny model: every point, its numbers, and what stands beside them."""

import json
import random

import numpy as np
import pytest
import torch
from test_study import _cache  # noqa: F401  a cache folder of its own
from tiny_models import SMALL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dlr
from dlr.base.models import NANO
from dlr.figures import predecessor as beside
from dlr.measure import evaluate
from dlr.routing.config import RouterConfig
from dlr.routing.policy import LayerDrop, RouterPolicy
from dlr.runs import project_root
from dlr.settings import read_params
from dlr.train.objectives import OBJECTIVES
from dlr.workbook import findings, predecessor
from dlr.workbook.phases.predecessor import METHODS, PredecessorConfig
from dlr.workbook.places import open_run
from dlr.workbook.sweeps import points_of

WORDS = "the a cat dog house tree runs sees under over with and red blue old small water light".split()


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """Intervals are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BOOTSTRAP", 20)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Settings of a tiny model and of text in that form."""
    place, rng = tmp_path_factory.mktemp("predecessor"), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"vocab_size": 4096}, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(NANO).save_pretrained(place / "base")
    (place / "text").mkdir()

    def line(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words)) + "\n"
    (place / "text" / "train.txt").write_text("".join(line(60) for _ in range(30)))
    (place / "text" / "valid.txt").write_text("".join(line(rng.randint(30, 60)) for _ in range(11)))
    return {"model": str(place / "base"), "dataset": str(place / "text"), "lines": 30, "seq_len": 16, "eval_len": 48,
            "calibration_docs": 8, "eval_docs": 11, "always_keep": 2, "steps": 2, "batch_size": 2, "lora_rank": 2,
            "adapter_tokens": 256, "order_tokens": 64, "candidates": 2, "label_tokens": 256, "visits": 1000,
            "router_hidden": 16, "skip_adapter_rank": 2, "budgets": [0.25], "masks": [[3, 5]], "bf16": False, "seed": 1}


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLR_RESULTS", str(tmp_path_factory.mktemp("results")))
        found = {}
        for point in predecessor.POINTS:
            own = {} if point == "depth_router" else {"skip_adapter_rank": 0}
            config = PredecessorConfig(**given | own | {"point": point, "run_name": point})
            run = open_run("predecessor", config, say=lambda text: None)
            predecessor.measure(config, run)
            found[point] = run
        yield found


def test_every_row_has_both_averages_and_both_skips(runs, given):
    for point, run in runs.items():
        metrics = json.loads((run.folder / "metrics.json").read_text())
        assert metrics["nll"].keys() == {row["variant"] for row in metrics["rows"]}
        predicted = np.array(metrics["predicted"])
        assert len(predicted) == given["eval_docs"] == 11 and predicted.max() <= given["eval_len"] - 1
        for row in metrics["rows"]:
            nll = np.array(metrics["nll"][row["variant"]])
            means = [nll[part].sum() / predicted[part].sum() for part in (slice(8), slice(8, None))]
            assert row["perplexity_batches"] == pytest.approx(np.exp(np.mean(means)), rel=1e-4)
            assert row["perplexity"] == pytest.approx(np.exp(nll.sum() / predicted.sum()), rel=1e-4)
            assert row["point"] == point and 0 <= row["skip_padded"] <= 1
            if row["kind"] in ("base", "dense"):
                assert row["skip"] == row["skip_padded"] == 0 or "layers" in row


def test_a_mask_is_the_same_for_all_positions(runs):
    for point in ("dense", "stochastic"):
        full, masked = runs[point].rows
        assert masked["layers"] == [3, 5] and masked["keep_rate"] == [1, 0, 1, 0]
        assert masked["skip"] == masked["skip_padded"] == 0.5 and full["skip"] == 0
    assert runs["stochastic"].rows[0]["variant"] == "stochastic depth 30%"


def test_the_rows_that_were_lacking_stand_at_one_skip(runs):
    rows = {row["variant"]: row for row in runs["depth_router"].rows}
    for asked in ("18%", "25%"):
        assert rows[f"best static at {asked}"]["skip"] == pytest.approx(rows[f"DLR at {asked}"]["skip"], abs=1e-6)
        static = rows[f"best static at {asked}"]
        assert static["skip_padded"] == pytest.approx(static["skip"], abs=1e-6)
        assert static["adapter_parameters"] == rows[f"DLR at {asked}"]["adapter_parameters"] > 0


def test_a_table_puts_rows_beside_base_and_dense(runs):
    table = beside.table_of(runs)
    dense = table[table["variant"] == "dense LoRA"].iloc[0]
    assert dense["to_dense"] == 1 and dense["gap"] == dense["gap_low"] == dense["gap_high"] == 0
    base = table[table["kind"] == "base"].iloc[0]
    assert base["to_base"] == 1 and base["to_dense"] == pytest.approx(1 / dense["to_base"])
    assert base["gap"] == pytest.approx(np.log(base["perplexity"] / dense["perplexity"]), abs=1e-4)
    means = beside.over_seeds(table)
    assert len(means) == len(table) and (means["runs"] == 1).all() and means["skip"].is_monotonic_increasing
    two = beside.over_seeds(beside.table_of(runs | {"again": runs["dense"]}))
    assert two[two["variant"] == "dense LoRA"]["runs"].item() == 2
    alone = beside.table_of({"depth_router": runs["depth_router"]})
    assert "to_dense" not in alone and alone["to_base"].isna().all() and len(beside.over_seeds(alone))
    assert list(beside.over_seeds(beside.table_of({}))) == beside.COLUMNS
    told = findings.predecessor(table)
    assert "**DLR at 18%** (seed 1) skips" in told and findings.predecessor(alone) == findings.NOTHING
    assert beside.ratios(table, "tiny") is not None


def test_published_ratios_are_those_of_the_issue():
    table = beside.published().set_index(["model", "variant"])["to_dense"].round(2)
    assert table["SmolLM2-135M, 150 steps", "token DLR 30"] == 3.13
    assert table["TinyLlama-1.1B-Chat, 500 steps", "token DLR 30"] == 1.43


def test_its_gate_without_noise_is_the_sigmoid_above_a_half(llama, ids):
    """In training too: value by the sign of the logit, gradient of the sigmoid, none for the layers below."""
    config = RouterConfig(router_class="PlainRouter", always_keep=2, keep_first_tokens=0, keep_bias=0.0)
    routing = dlr.attach(llama, config)
    torch.nn.init.normal_(routing.router.net[-1].weight, std=1.0)
    drawn = []
    for policy in (RouterPolicy(), RouterPolicy(training=True, noise=0.0, temperature=1.0)):
        with routing.using(policy):
            llama(ids)
        drawn.append(routing.plan)
    still, trained = drawn
    opened = torch.sigmoid(still.logits) > 0.5
    assert torch.equal(still.gates > 0.5, opened) and torch.equal(trained.gates > 0.5, opened) and 0 < opened.float().mean() < 1
    hidden = torch.randn(1, 3, routing.router.width, requires_grad=True)
    gates, logits = routing.router.draw(hidden, None, 0.0, 1.0, 0.0)
    gates.sum().backward()
    share = torch.sigmoid(logits.detach())
    assert torch.allclose(routing.router.net[-1].bias.grad, (share * (1 - share)).sum((0, 1)))
    assert hidden.grad is None
    assert [layer.weight.shape[0] for layer in routing.router.net if hasattr(layer, "weight")] == [16, 8, 4]


def test_its_router_comes_back_from_its_checkpoint(runs, given, ids):
    opened = dlr.load(runs["router"].folder / "router" / "checkpoint")
    assert type(opened.routing.router).__name__ == "PlainRouter" and opened.routing.threshold == 0.0


def test_one_coin_a_layer_and_batch(llama, ids):
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0))
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        with torch.no_grad(), routing.using(LayerDrop(0.5, level="batch")):
            llama(ids)
        gates = routing.plan.gates
        assert gates.shape == (*ids.shape, 4) and torch.equal(gates, gates[:1, :1].expand_as(gates))
        seen.add(tuple(gates[0, 0].tolist()))
    assert len(seen) > 4


def test_weights_are_its_own_over_their_sum():
    """CE + 0.2 * 4 * (sum over 128 positions) KL + 400 * missed^2, divided by 26.6."""
    config = PredecessorConfig(point="router")
    assert config.kd_weight / (1 - config.kd_weight) == pytest.approx(0.2 * 128, rel=2e-3)
    assert config.target_weight / (1 - config.kd_weight) == pytest.approx(400, rel=5e-3)
    assert round(config.warmup * config.steps) == 10 and config.gumbel_start == config.gumbel_end == 1

    class Plan:
        gates = torch.cat([torch.ones(1, 6, 4), torch.zeros(1, 4, 4)], 1)
        real = torch.ones(1, 10, dtype=torch.bool)
    term = OBJECTIVES[config.objective](config).term(Plan)
    assert float(term) == pytest.approx(config.target_weight * (0.4 - 0.3) ** 2)


def test_a_value_that_is_given_counts_before_the_methods():
    for point, changes in METHODS.items():
        config = PredecessorConfig(point=point)
        assert all(getattr(config, name) == value for name, value in changes.items())
        assert PredecessorConfig(point=point, kd_weight=0.25).kd_weight == 0.25
    assert PredecessorConfig(point="stochastic", lora_targets=[]).lora_targets == []


@pytest.mark.parametrize("units, asked", [(26, 0.3), (26, 0.5), (19, 0.15), (19, 0.3), (19, 0.35), (19, 0.5)])
def test_the_masks_of_the_files_are_what_one_seed_draws(units, asked):
    file, first = ("smollm2", 4) if units == 26 else ("tinyllama", 3)
    drawn = torch.rand(units, generator=torch.Generator().manual_seed(1234)) < asked
    masks = read_params(project_root() / f"params/predecessor/{file}.yaml")["common"]["masks"]
    assert [first + unit for unit in range(units) if drawn[unit]] in masks


def test_a_setting_of_the_command_is_every_points(given):
    phase, points = points_of(project_root() / "params/predecessor/smollm2-standin.yaml", "", [f"dataset={given['dataset']}", "steps=2"])
    assert phase == "predecessor" and len(points) > 10
    assert all(point["dataset"] == given["dataset"] and point["steps"] == 2 for _, point in points)
    assert {point["point"] for _, point in points} == set(predecessor.POINTS)
