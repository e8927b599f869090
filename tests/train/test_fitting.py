"""A batch that does not fit is taken in smaller passes, and trains as the whole one would."""

import pandas as pd
import pytest
import torch
from test_training import Rows, trained

from dlr.train import fitting
from dlr.train.trainer import DLRTrainer


@pytest.fixture
def small(monkeypatch):
    """Memory that holds so many rows of a pass from a step on, by CUDA's own words."""
    def limit(rows, step=0):
        loss = DLRTrainer.compute_loss

        def limited(trainer, model, inputs, *args, **options):
            if trainer.state.global_step >= step and len(inputs["input_ids"]) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss(trainer, model, inputs, *args, **options)
        monkeypatch.setattr(DLRTrainer, "compute_loss", limited)
    return limit


@pytest.mark.parametrize("rows, step, save_steps, taken", [
    (1, 0, 50, [1, 1, 1]),          # twice halved, before anything was trained
    (2, 2, 50, [2, 2, 2]),          # in the third step: back to the start
    (2, 2, 1, [4, 4, 2]),           # or to a checkpoint
])
def test_it_trains_what_the_whole_batch_trains(tmp_path, small, rows, step, save_steps, taken):
    settings = {"batch_size": 4, "accumulation": 2, "steps": 3, "save_steps": save_steps}
    whole = trained(tmp_path / "whole", Rows(8), **settings)
    small(rows, step)
    with pytest.warns(UserWarning, match="does not fit in memory: from here on a pass takes 2, and a step 4 passes") as said:
        parts = trained(tmp_path / "parts", Rows(8), **settings)
    assert sum("does not fit" in str(each.message) for each in said) == (2 if rows == 1 else 1)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=5e-5), name
    log, other = (pd.read_csv(tmp_path / name / "log.csv") for name in ("parts", "whole"))
    assert list(log["rows"]) == taken and list(log["step"]) == [1, 2, 3] and set(other["rows"]) == {4}
    for column in ("ce", "kd", "skip", "threshold"):
        assert log[column].to_numpy() == pytest.approx(other[column].to_numpy(), abs=1e-4), column


def test_what_cannot_be_made_smaller_is_said(tmp_path, small, monkeypatch):
    small(0)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"A pass of 1 sequence.s. does not fit .*checkpointing=true"):
        trained(tmp_path / "one", Rows(), batch_size=2)
    small(1)
    monkeypatch.setattr(fitting, "count", lambda: 2)                  # the other would wait for this one
    with pytest.raises(ValueError, match="Set batch_size to half and accumulation to twice"):
        trained(tmp_path / "two", Rows(), batch_size=2)


def test_another_error_is_none_of_memory(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(DLRTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        trained(tmp_path, Rows(), batch_size=4)


def test_a_batch_is_made_up_of_equal_passes():
    assert [fitting.fewer_rows(rows) for rows in (2, 3, 4, 6, 8, 9, 10)] == [1, 1, 2, 3, 4, 3, 5]
