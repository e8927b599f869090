"""The figure of the dial: a point lies on the dashes where the skip is the one asked for."""

import json

import matplotlib.pyplot as plt
import numpy as np

from dlr.figures.register import registered
from dlr.runs import Run


def test_every_setting_of_the_dial_is_a_point(tmp_path):
    dial = [{"asked": 0.1, "skip": 0.1}, {"asked": 0.5, "skip": 0.45}]
    rows = [{"variant": "DLR at 20%", "kind": "routed", "target_skip": 0.2, "skip": 0.21},
            {"variant": "DLR at 20%, shuffled", "kind": "shuffled", "target_skip": 0.2, "skip": 0.9}]
    for name, extra in (("a", {"dial": dial}), ("b", {})):
        Run(tmp_path / "pareto" / name).finish(rows, **extra)
        settings = {"model": name, "dataset": "embedded", "steps": 40}
        (tmp_path / "pareto" / name / "run.json").write_text(json.dumps({"settings": settings}))
    entry = registered()["pareto_calibration"]
    upper, lower = entry.draw(*entry.files_of(tmp_path)["calibration"]).axes
    points = {line.get_label(): line.get_xydata() for line in upper.lines}
    np.testing.assert_allclose(points["a on embedded, 40 steps"], [[10, 10], [50, 45]])
    np.testing.assert_allclose(points["b on embedded, 40 steps"], [[20, 21]], err_msg="without a dial, its budgets")
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [0, -5], atol=1e-12)
    plt.close("all")
