"""Figures of penalties: what each ends at, on axes of their own, several models together."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dlr.figures.register import registered
from dlr.runs import Run


def finished(folder, rows: list[dict], **settings) -> None:
    Run(folder).finish([{"kind": "routed", "perplexity_low": row["perplexity"] / 2,
                         "perplexity_high": row["perplexity"] * 2, **row} for row in rows])
    (folder / "run.json").write_text(json.dumps({"settings": settings}))


@pytest.fixture
def results(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.2)):
        rows = [{"variant": f"lambda = {penalty:g}", "skip": skip + shift, "active_layers": 16 - 10 * (skip + shift),
                 "perplexity": np.exp(3 + skip)} for penalty, skip in ((0.3, 0.0), (1, 0.2), (3, 0.6))]
        finished(tmp_path / f"sequence_routing/seed={seed}", [{"variant": "dense LoRA", "kind": "dense", "skip": 0.0,
                                                               "active_layers": 16, "perplexity": 20.0}, *rows], model="nano")
    for penalty in (0.5, 2):
        rows = [{"variant": name, "kind": kind, "skip": penalty / 4, "active_layers": 9, "perplexity": 9.0}
                for name, kind in (("v1", "routed"), ("v1, shuffled", "shuffled"))]
        finished(tmp_path / f"token_routing/penalty={penalty}", rows, model="other", penalty=penalty)
    finished(tmp_path / "token_routing/default", [{"variant": "v1", "skip": 0.5, "active_layers": 8, "perplexity": 9.0}],
             model="third", penalty=1.0)
    yield tmp_path
    plt.close("all")


def test_layers_and_loss_stand_against_the_penalty_on_twin_axes(results):
    entry = registered()["penalties"]
    files = entry.files_of(results)
    assert list(files) == ["penalties_nano_sequences", "penalties_other_tokens"], "a single penalty is no sweep"
    left, right = entry.draw(*files["penalties_nano_sequences"]).axes
    assert left.get_xscale() == "log" and [label.get_text() for label in left.get_xticklabels()] == ["0.3", "1", "3"]
    np.testing.assert_allclose(left.lines[0].get_xydata().T, [[0.3, 1, 3], [15, 13, 9]])
    ((points, _, (bars,)),) = right.containers
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), [3.0, 3.2, 3.6])
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([3 - np.log(2), 3 + np.log(2)])


def test_several_models_stand_on_one_axis(results):
    entry = registered()["phase_transition"]
    (axes,) = entry.draw(*entry.files_of(results)["phase_transition"]).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["nano, sequences"] == pytest.approx([90, 70, 30])
    assert lines["other, tokens"] == pytest.approx([87.5, 50]) and len(lines) == 2
