"""Figures of training, from logs made here: every method has its line, and the line is its log."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dlr.figures import curves
from dlr.figures.register import registered
from dlr.runs import Run

STEPS = np.arange(1, 9)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def trained(folder, logs: dict[str, pd.DataFrame], **settings) -> Run:
    """A finished run whose variants have these logs."""
    run = Run(folder)
    run.finish([{"variant": name, "kind": "routed", "always_keep": 2} for name in logs])
    settings = {"model": "nano", "dataset": "embedded", "steps": 8, **settings}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    for name, log in logs.items():
        (folder / name).mkdir()
        log.to_csv(folder / name / "log.csv", index=False)
    return run


def log(level: float, **columns) -> pd.DataFrame:
    """Losses that fall from `level` to a tenth of it above; held-out text every fourth step."""
    ce = level + level / STEPS
    return pd.DataFrame({"step": STEPS, "ce": ce, "kd": ce / 10, "budget": 0.0, "skip": STEPS / 16,
                         "temperature": np.nan, "keep_0": 1.0, "keep_1": 0.5,
                         "val_ce": np.where(STEPS % 4 == 0, ce + 1, np.nan), **columns})


@pytest.fixture
def results(tmp_path):
    trained(tmp_path / "baselines/default", {"dense": log(3), "stochastic": log(4)})
    trained(tmp_path / "sequence_routing/default", {"lambda-0.3": log(3.5)})
    for seed in (0, 1):
        trained(tmp_path / f"pareto/router-seed={seed}", {"router": log(2 + seed)}, seed=seed)
    trained(tmp_path / "pareto/smollm2", {"router": log(2)}, model="smollm2")
    return tmp_path


def drawn_lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}


def test_held_out_loss_of_all_methods_stands_in_one_figure_a_model(results):
    entry = registered()["validation_loss"]
    files = entry.files_of(results)
    assert list(files) == ["validation_loss", "validation_loss_smollm2_embedded_8"]
    picture = entry.draw(*files["validation_loss"])
    lines = {axes.get_title(): drawn_lines(axes) for axes in picture.axes}
    assert {phase: list(names) for phase, names in lines.items()} == {
        "Baselines": ["dense LoRA", "stochastic depth"], "Sequence-level routing": ["\u03bb = 0.3"], "Frontier": ["DLR"]}
    steps, values = lines["Baselines"]["dense LoRA"]
    assert steps == [4, 8] and values == pytest.approx([3 + 3 / 4 + 1, 3 + 3 / 8 + 1])
    assert lines["Frontier"]["DLR"][1] == pytest.approx([2.5 * (1 + 1 / 4) + 1, 2.5 * (1 + 1 / 8) + 1]), "a mean of seeds"


def test_without_held_out_losses_the_figure_is_missing(tmp_path):
    entry = registered()["validation_loss"]
    assert entry.files_of(tmp_path) == {}
    trained(tmp_path / "baselines/default", {"dense": log(3).drop(columns="val_ce"), "stochastic": log(3, val_ce=np.nan)})
    assert entry.files_of(tmp_path) == {} and list(registered()["training_loss"].files_of(tmp_path)) == ["training_loss"]


def test_training_loss_is_smoothed_and_neither_shifted_nor_scaled(results):
    entry = registered()["training_loss"]
    (baselines, *_) = entry.draw(*entry.files_of(results)["training_loss"]).axes
    steps, values = drawn_lines(baselines)["stochastic depth"]
    raw = (4 + 4 / STEPS).tolist()
    assert steps == STEPS.tolist() and values[0] == raw[0]
    assert all(own < smooth < before for own, smooth, before in zip(raw[1:], values[1:], values))
    flat = {"Frontier": {"DLR": pd.Series(2.0, index=STEPS)}}
    assert drawn_lines(curves.training_loss(flat).axes[0])["DLR"][1] == pytest.approx([2.0] * len(STEPS))


def test_the_default_run_stands_for_its_phase_and_others_are_told_apart(results):
    trained(results / "baselines/long", {"dense": log(5)})
    trained(results / "pareto/low", {"router": log(5)})
    panels, _ = registered()["training_loss"].files_of(results)["training_loss"]
    assert list(panels["Baselines"]) == ["dense LoRA", "stochastic depth"]
    assert list(panels["Frontier"]) == ["DLR, low", "DLR, router"]


def test_a_loss_is_broken_down_into_the_terms_that_it_has():
    logs = {"DLR": log(3), "v2": log(3, budget=50.0 / STEPS), "without": log(3, kd=0.0)}
    picture = curves.loss_breakdown(logs)
    labels = {axes.get_title(): list(drawn_lines(axes)) for axes in picture.axes}
    assert labels == {"DLR": ["cross-entropy", "distillation"], "v2": ["cross-entropy", "distillation", "budget term"],
                      "without": ["cross-entropy"]}
    assert [axes.get_yscale() for axes in picture.axes] == ["linear", "log", "linear"]


@pytest.mark.parametrize("name", ["token_routing_loss_breakdown", "token_routing_temperature"])
def test_variants_that_skip_nothing_are_not_broken_down(name, tmp_path):
    trained(tmp_path / "token_routing/default", {"DLR": log(3), "dense": log(3, skip=0.0)})
    ((logs, _, always_keep),) = registered()[name].files_of(tmp_path).values()
    assert list(logs) == ["DLR"] and always_keep == 2


def test_temperature_and_depth_stand_on_their_own_axes():
    logs = {"noisy": log(3, temperature=1 / STEPS), "still": log(3)}
    picture = curves.temperature(logs, always_keep=2)
    noisy, still, beside = picture.axes
    for axes in (noisy, still):
        assert drawn_lines(axes)["active layers (left)"][1] == pytest.approx((2 + 2 * (1 - STEPS / 16)).tolist())
    assert drawn_lines(beside)["temperature (right)"][1] == pytest.approx((1 / STEPS).tolist())
