"""The token analysis says what it found, in both directions, and where its router is missing."""

import pytest

from dlr.base import find
from dlr.figures.register import redraw
from dlr.measure.record import record
from dlr.runs import finished_runs, project_root
from dlr.settings import read_params, validated
from dlr.workbook import findings, token_study
from dlr.workbook.phases import PHASES


def metrics(low, captured):
    row = {"weights": "base", "skip": 0.4, "static": 0.3, "routed": 0.25, "oracle": 0.1, "captured": captured,
           "captured_low": captured - 0.1, "captured_high": captured + 0.1}
    return {"shuffled": {"nll_difference": low + 0.01, "low": low, "high": low + 0.02, "routed": 30.0, "shuffled": 31.0},
            "variance": {"layers": 0.8, "tokens": 0.05, "within": 0.15}, "between": {"token": 0.4, "document": None},
            "information": {"category": {"explained": 0.05, "information": 0.1, "chance": 0.02}},
            "collapse": {"flags": ["no unit is routed by token"]}, "rows": [row],
            "probes": [{"depth": 4, "probe": "linear", "r2": 0.12, "tokens": 4512},
                       {"depth": 8, "probe": "linear", "r2": 0.5, "tokens": 4512}]}


def test_the_verdict_follows_the_numbers():
    yes, no = (findings.token_analysis(metrics(low, captured), 4) for low, captured in ((0.005, 0.25), (-0.015, -0.2)))
    assert "The plan depends on the token" in yes and "**25%**" in yes and "12% (linear)" in yes and "50%" not in yes
    assert "worth nothing that can be measured" in no and "**-20%**" in no and "Collapse: no unit is routed by token." in no


def test_a_missing_embedded_router_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "NANO_ROUTER", tmp_path / "router")
    with pytest.raises(FileNotFoundError, match="dlr/nano/router.*--set checkpoint="):
        token_study.open_study(validated({}, PHASES["token_analysis"][1]))


def test_an_untrained_router_spreads_its_gates():
    study = token_study.open_study(validated({"untrained": True, "calibration_docs": 2, "eval_len": 24, "record_docs": 4},
                                             PHASES["token_analysis"][1]))
    assert study.routing.calibration.skip == pytest.approx(0.4, abs=0.02)
    gates = record(study.model, study.routing, study.tokenizer, study.test.texts[:2], max_len=48, bar=False).gates.float()
    assert gates.mean(0).std() > 0.02 and 0.3 < gates.mean() < 0.9 and len(gates.unique(dim=0)) > 40
    found = token_study.shuffled_gap(study)
    assert found["shuffled"] != found["routed"]
    study.routing.router.net[-1].weight.data.zero_()                    # a static plan is nobody's in particular
    study.routing.router.net[-1].bias.data[::2] = -9.0
    same = token_study.shuffled_gap(study)
    assert same["nll_difference"] == same["low"] == same["high"] == 0


@pytest.mark.parametrize("path", sorted((project_root() / "params" / "token_analysis").glob("*.yaml")),
                         ids=lambda p: p.name)
def test_shipped_params_are_valid(path):
    validated(read_params(path), PHASES["token_analysis"][1])


def test_figures_of_committed_runs_are_drawn_from_their_records_alone(tmp_path, monkeypatch):
    runs = finished_runs("token_analysis", project_root() / "results")
    monkeypatch.setattr(token_study, "open_study", None)
    for name in runs:
        made = redraw(project_root() / "results" / "token_analysis" / name, tmp_path)
        assert {p.stem for p in made} == {"category_depth", "headroom", "predictability", "difficulty", "position", "words", "token_map"}
        for row in runs[name]["metrics"]["rows"]:
            room = row["static"] - row["oracle"]
            assert room > 0.3 * row["static"], "the oracle's own plan, not the static one in its stead"
            assert row["captured"] == pytest.approx((row["static"] - row["routed"]) / room)
            assert row["captured_low"] < row["captured"] < row["captured_high"]
    assert runs, "no committed run of token_analysis"
