"""Validation while training: it disturbs nothing, measures what evaluation would, and keeps the best state."""

import json

import pandas as pd
import pytest
import torch
from test_training import SETTINGS, Rows
from tiny_models import tiny
from transformers import set_seed

import dlr
from dlr.base.models import add_lora
from dlr.measure.evaluate import evaluate, mean_nll, skip_ratio
from dlr.measure.static import evaluate_static, forced_share
from dlr.routing.budget import threshold_at
from dlr.routing.elastic import ElasticStatic
from dlr.routing.policy import LayerDrop, RouterPolicy
from dlr.settings import SettingsError, validated
from dlr.train.kept import kept_states
from dlr.train.settings import RunConfig
from dlr.train.trainer import DLRTrainer
from dlr.train.validation import Validation


def held_out(count=6, batch=4):
    """Batches as evaluation has them, of rows of unequal length."""
    rows = [row["input_ids"] for row in Rows(count, seed=11).rows]
    batches = []
    for start in range(0, count, batch):
        part = rows[start:start + batch]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "row": torch.arange(start, start + len(part))})
    return batches


def trainer_of(folder, policy=None, validation=None, data=None, **changes):
    set_seed(0)
    config = RunConfig(**{**SETTINGS, "steps": 6, "batch_size": 4, "eval_steps": 2, "lora_dropout": 0.1, **changes})
    model = add_lora(tiny(), rank=config.lora_rank, dropout=config.lora_dropout)
    dlr.attach(model, config.router())
    return DLRTrainer(model, config, data or Rows(equal=True), folder, policy, validation)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("policy, changes", [
    (None, {}), (LayerDrop(0.5), {}),
    (None, {"router_class": "DepthRouter", "warm_start": True, "router_share": 0.5}),
])
def test_the_same_bits_are_trained_with_and_without_it(tmp_path, policy, changes):
    """With dropout, drawn gates and layers dropped at random: what draws is put back."""
    ends = []
    for batches in (held_out(), None):
        trainer = trainer_of(tmp_path / str(bool(batches)), policy, batches, steps=4, **changes)
        trainer.fit()
        ends.append((weights(trainer), trainer.routing.calibration))
    (first, calibration), (second, other) = ends
    assert all(torch.equal(first[name], second[name]) for name in first) and calibration == other
    logs = [pd.read_csv(tmp_path / name / "log.csv") for name in ("True", "False")]
    assert list(logs[0]["val_ce"].notna()) == [False, True] * 2 and logs[1]["val_ce"].isna().all()
    other = [name for name in logs[0] if not name.startswith("val_") and name != "tokens_per_second"]
    assert logs[0][other].equals(logs[1][other])


def test_it_is_what_evaluation_would_say(tmp_path):
    batches = held_out()
    trainer = trainer_of(tmp_path, None, batches, steps=3, target_skip=0.4)
    trainer.fit()
    log = pd.read_csv(tmp_path / "log.csv")
    assert list(log["step"][log["val_ce"].notna()]) == [2, 3], "the last step too"
    table = evaluate(trainer.model, trainer.routing, batches, RouterPolicy())
    assert log["val_ce"].iloc[-1] == pytest.approx(mean_nll(table), rel=1e-5)
    assert log["val_skip"].iloc[-1] == pytest.approx(skip_ratio(table), abs=1e-5)
    assert table["tokens"].sum() == sum(int(batch["attention_mask"].sum()) for batch in batches), "padding never counts"


def test_an_elastic_training_is_measured_at_its_target_in_both_arms(tmp_path):
    config = RunConfig(**SETTINGS | {"router_class": "DepthRouter", "warm_start": True, "elastic": True, "target_skip": 0.3})
    model, batches = tiny(), held_out()
    routing = dlr.attach(model, config.router())
    routing.calibration.curve = [-1 + place / 40 for place in range(81)]
    order = [2, 0, 3, 1]
    row = Validation(batches, ElasticStatic(order), config, routing)(model, False)
    forced = forced_share(batches, config.keep_first_tokens)
    table = evaluate_static(model, routing, batches, order, 0.3, forced)
    assert row == {"val_ce": pytest.approx(mean_nll(table)), "val_skip": pytest.approx(skip_ratio(table))}
    assert row["val_skip"] == pytest.approx(0.3, abs=1e-6)
    row = Validation(batches, None, config, routing)(model, False)
    with routing.at(threshold=threshold_at(routing.calibration.curve, 0.3)):
        table = evaluate(model, routing, batches, RouterPolicy())
    assert row["val_ce"] == pytest.approx(mean_nll(table)) and row["val_skip"] == pytest.approx(skip_ratio(table))


def test_stochastic_depth_is_validated_under_the_same_draws_each_time():
    config, model, batches = RunConfig(**SETTINGS), tiny(), held_out()
    validation = Validation(batches, LayerDrop(0.5), config, dlr.attach(model, config.router()))
    before = torch.get_rng_state()
    first = validation(model, False)
    assert torch.equal(torch.get_rng_state(), before) and 0.1 < first["val_skip"] < 0.9
    torch.rand(3)
    assert validation(model, False) == first


def scripted(trainer, losses):
    """Validation that gives `losses` one after the other."""
    values = iter(losses)
    trainer.validation = lambda model, together: {"val_ce": next(values), "val_skip": 0.5}
    return trainer


def test_the_best_state_is_kept_beside_the_last_which_stays_in_the_model(tmp_path):
    """Of steps 1, 2 and 3 the second is best; another that is best at its end leaves the last alone."""
    trainer = scripted(trainer_of(tmp_path, LayerDrop(0.0), held_out(), steps=3, eval_steps=1), [3.0, 2.0, 2.5])
    seen, step_done = {}, trainer.step_done

    def noted(step):
        seen[step] = weights(trainer)
        return step_done(step)
    trainer.step_done = noted
    assert trainer.fit() == 3
    states = {}
    for name in kept_states(trainer.model, trainer.routing, tmp_path, 3):
        states[name] = weights(trainer)
    assert list(states) == ["best", "checkpoint"]
    for name in seen[2]:
        assert torch.equal(states["best"][name], seen[2][name]) and torch.equal(states["checkpoint"][name], seen[3][name])
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    falling = scripted(trainer_of(tmp_path / "b", LayerDrop(0.0), held_out(), steps=2, eval_steps=1), [3.0, 2.0])
    falling.fit()
    assert list(kept_states(falling.model, falling.routing, tmp_path / "b", 2)) == ["checkpoint"]


def test_a_best_state_that_was_cut_short_is_none(tmp_path):
    """Step 2 is better than step 1, and the process ends while it is written over it."""
    trainer = scripted(trainer_of(tmp_path, LayerDrop(0.0), held_out(), steps=3, eval_steps=1), [3.0, 2.0])
    save = trainer._save

    def killed(output_dir=None, state_dict=None):
        save(output_dir, state_dict)
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
    trainer._save = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    best = tmp_path / "trainer" / "best"
    assert best.is_dir() and not (best / "trainer_state.json").exists()


def test_steps_that_do_not_hold_their_budget_are_no_best_ones(tmp_path):
    """A ramp's first steps skip less; an objective without a target always may."""
    for name, changes, best in (("ramp", {"ramp": 0.6}, [2]), ("no target", {"objective": "global_penalty"}, [])):
        trainer = scripted(trainer_of(tmp_path / name, None, held_out(), steps=3, eval_steps=1, **changes), [1.0, 2.0, 3.0])
        trainer.fit()
        kept = tmp_path / name / "trainer" / "best" / "trainer_state.json"
        assert ([json.loads(kept.read_text())["global_step"]] if kept.is_file() else []) == best


def test_patience_ends_a_training_which_is_then_finished(tmp_path):
    """Step 2 was best, and 3 and 4 were not. One that is asked for again is taken as it is."""
    def attempt(losses):
        return scripted(trainer_of(tmp_path, LayerDrop(0.0), held_out(), steps=40, eval_steps=1, patience=2), losses)
    assert attempt([3.0, 2.0, 2.1, 2.2]).fit() == 4
    assert list(pd.read_csv(tmp_path / "log.csv")["step"]) == [1, 2, 3, 4]
    again = attempt([])
    assert again.fit() == 4 and list(kept_states(again.model, again.routing, tmp_path, 40)) == ["best", "checkpoint"]


def test_patience_is_remembered_where_a_training_goes_on(tmp_path):
    """Killed in step 4, it goes on from step 2, whose loss was the first that was no better."""
    def attempt(losses, stop=40):
        trainer = trainer_of(tmp_path, LayerDrop(0.0), held_out(), steps=40, eval_steps=1, patience=3, save_steps=2)
        step_done = trainer.step_done

        def killed(step):
            if step == stop:
                raise KeyboardInterrupt
            return step_done(step)
        trainer.step_done = killed
        return scripted(trainer, losses)
    with pytest.raises(KeyboardInterrupt):
        attempt([2.0, 2.1, 2.2], stop=4).fit()
    assert attempt([2.2, 2.3]).fit() == 4, "the second and the third in a row"


@pytest.mark.parametrize("given, words", [
    ({"patience": 2, "eval_steps": 0}, "eval_steps=0 measures none"),
    ({"patience": 2, "objective": "original"}, "lowers by skipping less"),
])
def test_patience_without_what_it_waits_for_is_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        validated(given, RunConfig)
