"""Which rows an evaluation makes, what is above chance, paired differences, and the figures made from a results file."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dlr.bench.metering import Meter
from dlr.bench.table import _above, scores_table
from dlr.figures.benchmarks import agreements, bars, group_tasks, groups, layer_skips, scatter
from dlr.settings import SettingsError, validated
from dlr.workbook import evaluation, findings
from dlr.workbook.evaluation import evaluate_variants, paired, specs_of
from dlr.workbook.phases.evaluation import EvaluationConfig, VariantSpec

ROUTED = VariantSpec(name="routed", checkpoint="a/router")
STATIC = VariantSpec(name="static", checkpoint="a/static", match="routed")


def outcomes(*strings):
    return {"tasks": {f"group_{i}": {"outcomes": text} for i, text in enumerate(strings)}}


def row(variant, kind, score, skip):
    return {"variant": variant, "kind": kind, "skip": skip, "active_layers": 16.0, "flops": 1e6, "keep_rate": [0.5, 1.0],
            "requests": 8, "truncated": 0, "perplexity": {},
            "scores": [{"task": "group", "metric": "acc,none", "score": score, "stderr": 0.01, "chance": 0.5, "skip": skip,
                        "tasks": 2, "tasks_not_above_chance": ["group_1"], "above_chance": True, "notes": []}]}


@pytest.fixture
def comparison():
    rows = [row("base", "base", 0.7, 0.0), row("DLR", "routed", 0.6, 0.4)]
    leaf = {"acc_stderr,none": 0.02}
    harness = {"base": {"group_subtasks": {"group": ["group_0", "group_1"]},
                        "results": {"group_0": leaf | {"acc,none": 0.9}, "group_1": leaf | {"acc,none": 0.5}}},
               "DLR": {"group_subtasks": {"group": ["group_0", "group_1"]},
                       "results": {"group_0": leaf | {"acc,none": 0.8}, "group_1": leaf | {"acc,none": 0.4}}}}
    return rows, harness


def test_paired_differences_are_taken_item_by_item():
    found = {"routed": outcomes("1111", "1100"), "static": outcomes("1110", "1100")}
    (difference,) = paired(found, [ROUTED, STATIC])
    assert difference["difference"] == pytest.approx(0.125) and difference["tasks"] == 2
    # one of four items differs on one of two tasks: its own variance alone, halved by the mean over tasks
    half = 1.96 * np.sqrt(np.var([0, 0, 0, 1], ddof=1) / 4) / 2
    assert (difference["low"], difference["high"]) == pytest.approx((0.125 - half, 0.125 + half))
    same = paired({"routed": outcomes("1010"), "static": outcomes("1010")}, [ROUTED, STATIC])[0]
    assert same["difference"] == same["low"] == same["high"] == 0


def test_above_chance_is_the_exact_test_for_one_task_and_the_interval_for_a_group():
    one = [{"outcomes": "1" * 61 + "0" * 39}]
    assert _above({"chance": 0.5}, one) and not _above({"chance": 0.55}, one)
    group = [{"outcomes": "1"}, {"outcomes": "1"}]
    assert _above({"score": 0.6, "stderr": 0.04, "chance": 0.5}, group)
    assert not _above({"score": 0.6, "stderr": 0.06, "chance": 0.5}, group)
    assert not _above({"score": 0.9, "stderr": None, "chance": 0.5}, group)


def test_the_base_model_leads_and_named_variants_follow():
    config = EvaluationConfig(model="nano", variants=[ROUTED, STATIC])
    assert [spec.name for spec in specs_of(config)] == ["base", "routed", "static"]


def test_one_table_takes_the_checkpoints_of_several_phases_on_one_base(tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    for place, settings in (("baselines/a/dense", {"model": "org/m"}), ("token_routing/a/DLR", {"model": "org/m"}),
                            ("token_routing/b/DLR", {"model": "org/other"}),
                            ("token_routing/c/DLR", {"model": "org/m", "revision": "v2"})):
        folder = tmp_path / place / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "router_config.json").write_text('{"files": {}}')
        (folder.parents[1] / "metrics.json").write_text('{"rows": []}')
        (folder.parents[1] / "run.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr(evaluation, "missing_part", lambda folder: None)

    def names(**given):
        return [spec.name for spec in specs_of(validated({"model": "org/m", **given}, EvaluationConfig))]
    assert names(phase=["baselines", "token_routing"]) == ["base", "baselines, a, dense", "token_routing, a, DLR"]
    assert names(phase="token_routing") == names(phase=["token_routing"]) == ["base", "a, DLR"]
    assert names(phase="token_routing", revision="v2") == ["base", "c, DLR"]
    with pytest.raises(SettingsError, match="twice"):
        names(phase=["pareto", "pareto"])


@pytest.mark.parametrize("variants, message", [
    ([ROUTED, ROUTED], "Two variants are named 'routed'"),
    ([ROUTED, ROUTED.changed(name="routed?")], "would share a folder"),
    ([STATIC, ROUTED], "'static' is to match 'routed', which is no earlier row"),
])
def test_rows_that_cannot_be_told_apart_or_matched_are_refused(variants, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        evaluate_variants(EvaluationConfig(variants=variants), tmp_path)


def test_the_table_says_where_a_score_is_not_above_chance(comparison):
    table = scores_table(comparison[0])
    assert list(table["variant"]) == ["base", "DLR"]
    assert table["group (acc)"][1] == "0.6000 ± 0.0100 (1 of 2 tasks not above chance)"


def test_a_group_is_drawn_task_by_task_best_on_top(comparison):
    rows, harness = comparison
    assert groups(rows) == ["group"]
    axes = group_tasks(rows, harness, "group").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "0"]
    dots = [container[0].get_xdata().tolist() for container in axes.containers]
    assert dots == [[0.5, 0.9], [0.4, 0.8]]
    plt.close("all")


def test_every_row_is_in_the_figures(comparison):
    rows, _ = comparison
    assert [bar.get_width() for bar in bars(rows).axes[0].patches] == [0.6, 0.7]
    assert {text.get_text() for text in scatter(rows).legends[0].get_texts()} == {"base", "DLR"}
    heat = layer_skips(rows, always_keep=4).axes[0]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["4", "5"]
    plt.close("all")


@pytest.mark.slow
def test_rows_say_how_long_their_text_is_the_bases(tmp_path, monkeypatch):
    one_token = {"meter": asdict(Meter(12, scored=1, reach=1, kept=[1] * 12))}         # no task is run
    benchmark = {"tasks": {"none": one_token}, "harness": {"results": {}}}
    monkeypatch.setattr(evaluation, "run_benchmark", lambda *_, **__: benchmark)
    config = EvaluationConfig(agreement_docs=4, agreement_prompt=12, agreement_tokens=6)
    rows, _, differences = evaluate_variants(config, tmp_path)
    base, router, static = rows
    assert "agreement" not in base and router["agreement"]["prompts"] == 4
    assert 0.2 < router["agreement"]["skip"] < 0.6
    assert static["agreement"]["skip"] == pytest.approx(router["agreement"]["skip"], abs=1e-5)
    gap = static["agreement"]["against"]
    for name in ("agreed_tokens", "agreeing", "kl", "kl_own_text"):
        assert gap[name] == pytest.approx(router["agreement"][name] - static["agreement"][name])
    table = scores_table(rows)
    assert list(table["tokens agreed of 6 (95 %)"] == "–") == [True, False, False]
    told = findings.evaluation(rows, differences)
    assert "router is" in told and f"of 6 greedy tokens {gap['agreed_tokens']:+.1f} agree" in told
    left, right = agreements(rows).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["static plan", "router"]
    assert len(right.containers) == 4
    plt.close("all")
    monkeypatch.setattr(evaluation, "agreement", None)                 # what is kept is not measured again
    again, _, _ = evaluate_variants(config, tmp_path)
    assert [row.get("agreement") for row in again] == [row.get("agreement") for row in rows]


def test_rows_without_agreement_are_read_as_before(comparison):
    rows, _ = comparison
    assert agreements(rows) is None and not [name for name in scores_table(rows) if "KL" in name]
    assert "greedy" not in findings.evaluation(rows, [])


def test_a_better_router_is_called_better_by_tokens_that_agree():
    gap = {"agreed_tokens": 2.0, "agreed_tokens_low": 1.0, "agreed_tokens_high": 3.0, "kl": -0.1, "kl_low": -0.2,
           "kl_high": -0.05, "kl_own_text": -0.1}
    static = {"variant": "static", "perplexity": {}, "scores": [],
              "agreement": {"tokens": 8, "prompts": 3, "skip": 0.25, "match": "DLR", "against": gap}}
    assert "at 25.0 % skip, DLR is better than static" in findings.evaluation([static], [])


def test_settings_of_an_agreement_that_is_not_measured_are_refused():
    with pytest.raises(SettingsError, match="agreement_docs=0 continues no document, so that agreement_tokens would"):
        validated({"agreement_tokens": 8}, EvaluationConfig)
