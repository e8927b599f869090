"""Gradients, accumulation, padding, distillation and resumption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import half_skipping, tiny
from transformers import set_seed

import dlr
from dlr.base.models import add_lora
from dlr.measure.evaluate import calibrate_router, evaluate, perplexity, skip_ratio
from dlr.measure.likelihood import cross_entropy, frozen_base, kl_to_teacher, predicted
from dlr.routing.config import RouterConfig
from dlr.routing.plan import Plan, gate_entropy
from dlr.routing.policy import LayerDrop, RouterPolicy
from dlr.settings import Settings, SettingsError, validated
from dlr.train.objectives import OBJECTIVES, GlobalPenalty, Objective, Original
from dlr.train.settings import RunConfig
from dlr.train.stopping import EXIT, Stopped, heeding
from dlr.train.trainer import DLRTrainer, collate

SETTINGS = {"always_keep": 2, "steps": 2, "bf16": False, "warm_start": False, "target_skip": 0.5, "lr": 1e-2,
            "router_class": "Router", "router_hidden": 128, "skip_adapter_rank": 0, "router_lr": 1e-2, "lora_rank": 2}


class Rows(torch.utils.data.Dataset):
    """Fixed rows of unequal length."""

    def __init__(self, count=8, seed=3, equal=False):
        generator = torch.Generator().manual_seed(seed)
        lengths = [12] * count if equal else [12, 7, 9, 12, 5, 12, 8, 10][:count]
        self.rows = [{"input_ids": torch.randint(2, 97, (n,), generator=generator)} for n in lengths]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def loss_and_gradients(strategy, checkpointing=False):
    model = tiny()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    routing = half_skipping(model, RouterConfig(always_keep=2, keep_first_tokens=0, strategy=strategy))
    ids = torch.randint(2, 97, (2, 10), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(7)
    with routing.using(RouterPolicy(training=True)):
        logits = model(ids, use_cache=False).logits
    loss = cross_entropy(logits, ids, torch.ones_like(ids).bool()).mean() + routing.plan.budget
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("other", [("two_pass", False), ("single_pass", True), ("two_pass", True)])
def test_two_passes_and_checkpointing_give_the_same_loss_and_gradients(other):
    loss, gradients = loss_and_gradients("single_pass")
    loss2, gradients2 = loss_and_gradients(*other)
    assert loss == pytest.approx(loss2, abs=1e-6)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.allclose(gradient, gradients2[name], atol=1e-6), name
    assert any("dlr_router" in n and g.abs().max() > 0 for n, g in gradients.items())


def trained(tmp_path, data, ready=None, validation=None, **changes):
    """Trained LoRA and router; `ready(model, routing)` changes them before."""
    set_seed(0)
    config = RunConfig(**{**SETTINGS, **changes})
    model = add_lora(tiny(), rank=config.lora_rank)
    routing = dlr.attach(model, config.router())
    if ready:
        ready(model, routing)
    trainer = DLRTrainer(model, config.changed(gumbel_noise=0.0), data, tmp_path, None, validation)
    trainer.fit()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("objective", ["controlled", "global_penalty"])
def test_accumulation_equals_a_larger_batch(tmp_path, objective):
    """Not so for 'original': its squared target term is no mean over tokens."""
    data = Rows(equal=objective == "global_penalty")
    once = trained(tmp_path / "a", data, batch_size=4, objective=objective)
    four = trained(tmp_path / "b", data, batch_size=1, accumulation=4, objective=objective)
    for name in once:
        assert torch.allclose(once[name], four[name], atol=2e-5), name


def test_padding_changes_no_loss():
    model, rows = tiny(), Rows().rows
    routing = half_skipping(model)
    batch = collate(rows[:4])
    real = batch["attention_mask"].bool()
    together = cross_entropy(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
                             batch["input_ids"], real)
    skipped = (1 - routing.plan.kept).sum()
    alone, alone_skipped = [], 0
    for row in rows[:4]:
        ids = row["input_ids"][None]
        alone.append(cross_entropy(model(ids).logits, ids, torch.ones_like(ids).bool()))
        alone_skipped += (1 - routing.plan.kept).sum()
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert skipped == alone_skipped
    assert (batch["labels"] != -100).sum() == predicted(real).sum()


def test_distilling_a_model_from_itself_costs_nothing(ids):
    model = tiny()
    routing = half_skipping(model)
    with frozen_base(model, routing):
        teacher = model(ids).logits
    real = torch.ones_like(ids).bool()
    assert kl_to_teacher(teacher, teacher, real, 2.0).abs().max() == 0
    assert kl_to_teacher(model(ids).logits, teacher, real).mean() > 1e-4


def test_frozen_base_is_the_base_whatever_lora_and_router_do(ids):
    base = tiny()
    before = base(ids).logits
    config = RunConfig(**SETTINGS)
    model = add_lora(base, rank=config.lora_rank)
    routing = half_skipping(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(model(ids).logits, before)
    with frozen_base(model, routing):
        assert torch.equal(model(ids).logits, before)
    routing.detach()
    assert torch.equal(model.unload()(ids).logits, before)


def test_kl_in_chunks_equals_kl_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 8, 50, generator=generator, requires_grad=True) for _ in range(2))
    real = torch.ones(3, 8).bool()
    whole = kl_to_teacher(student, teacher.detach(), real, 2.0)
    monkeypatch.setattr("dlr.measure.likelihood.ROWS", 4)
    parts = kl_to_teacher(student, teacher.detach(), real, 2.0)
    assert torch.allclose(whole, parts)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (whole, parts)))


def test_the_original_budget_falls_until_nothing_runs_and_its_target_term_alone_does_not():
    """Why it was given up: the L1 terms, summed over layers, outweigh the target at every skip ratio."""
    def budget(skip, **weights):
        gates = torch.full((1, 1000, 4), 1 - skip)
        plan = Plan(gates, None, torch.ones(1, 1000).bool(), 2)
        return Original(RunConfig(objective="original", target_skip=0.4, **weights)).term(plan).item()
    skips = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    whole = [budget(skip, l1_weight=5.0, target_weight=8.0) for skip in skips]
    assert whole == sorted(whole, reverse=True)
    target = [budget(skip, l1_weight=0.0, target_weight=8.0) for skip in skips]
    assert skips[target.index(min(target))] == 0.4 and min(target) == pytest.approx(0)


def test_a_target_for_each_token_is_missed_by_unequal_tokens_that_meet_it_on_average():
    options = {"target_skip": 0.5, "weights": {"distance": 2.0}}
    objective, whole = (OBJECTIVES[name](RunConfig(objective=name, **options)) for name in ("token_target", "global_target"))
    real = torch.tensor([[True, True, False]])

    def term(rows, objective=objective):
        gates = torch.tensor([rows], requires_grad=True)
        value = objective.term(Plan(gates, None, real, 0))
        value.backward()
        return value.item(), gates.grad
    assert term([[1.0, 0, 1, 0], [0.0, 1, 1, 0], [1.0, 1, 1, 1]])[0] == 0
    value, grad = term([[1.0, 1, 1, 1], [0.0, 0, 0, 0], [0.0, 0, 0, 0]])
    assert value == pytest.approx(2 * 0.5) and not grad[0, 2].any(), "padding is free"
    assert term([[1.0, 1, 1, 1], [0.0, 0, 0, 0], [0.0, 0, 0, 0]], whole)[0] == 0, "a whole text may have unequal tokens"
    assert term([[1.0, 1, 1, 1], [1.0, 1, 0, 0], [0.0, 0, 0, 0]], whole)[0] == pytest.approx(2 * 0.25)
    assert (grad[0, 0] > 0).all() and (grad[0, 1] < 0).all(), "each token is pulled to the target from its side"


def test_one_global_penalty_is_the_same_price_for_every_gate_of_a_real_token():
    gates, real = torch.ones(2, 3, 4, requires_grad=True), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    GlobalPenalty(RunConfig(objective="global_penalty", penalty=0.8)).term(Plan(gates, None, real, 2)).backward()
    assert torch.allclose(gates.grad[real], torch.tensor(0.8 / 16)) and (gates.grad[~real] == 0).all()


def test_entropy_pulls_keep_rates_from_both_ends_and_depth_weighs_the_penalty():
    gates, real = torch.tensor([[[0.9, 0.1, 0.5]]], requires_grad=True), torch.ones(1, 1).bool()
    plan = Plan(gates, None, real, 2)
    term = GlobalPenalty(RunConfig(objective="global_penalty", penalty=0.0, entropy_weight=0.3)).term(plan)
    assert term.item() == pytest.approx(-0.3 * gate_entropy(gates))
    term.backward()
    assert gates.grad[0, 0, 0] > 0 > gates.grad[0, 0, 1] and gates.grad[0, 0, 2] == pytest.approx(0, abs=1e-6)
    gates.grad = None
    Original(RunConfig(objective="original", l1_weight=2.0, target_weight=0.0, l1_first=0.1, l1_last=2.1)).term(plan).backward()
    assert torch.allclose(gates.grad[0, 0], 2.0 * torch.tensor([0.1, 1.1, 2.1]))


@pytest.fixture
def squared():
    """An objective of one's own, as a notebook or a user's file defines it."""
    class Squared(Objective, name="squared"):
        class Weights(Settings):
            weight: float = 8.0

        def term(self, plan):
            return self.weights.weight * (1 - plan.budget - self.config.target_skip) ** 2

        def after_step(self, routing, step, row):
            told.append((step, row["skip"]))
    told = []
    yield told
    del OBJECTIVES["squared"]


def test_an_objective_is_one_class_with_its_term_its_weights_and_its_end_of_a_step(tmp_path, squared):
    trained(tmp_path / "mild", Rows(equal=True), objective="squared", weights={"weight": 0.5})
    trained(tmp_path / "plain", Rows(equal=True), objective="squared")
    mild, plain = (pd.read_csv(tmp_path / name / "log.csv") for name in ("mild", "plain"))
    assert plain["budget"][0] == pytest.approx(8 * (plain["skip"][0] - 0.5) ** 2, rel=1e-4)
    assert plain["budget"][0] == pytest.approx(16 * mild["budget"][0], rel=1e-4)
    assert [step for step, _ in squared] == [1, 2, 1, 2] and squared[0][1] == pytest.approx(mild["skip"][0], abs=1e-6)
    for given, words in (({"objective": "squred"}, "the objectives are .*original, squared"),
                         ({"objective": "squared", "weights": {"wieght": 1.0}}, "did you mean 'weight'"),
                         ({"weights": {"weight": 1.0}}, "unknown setting 'weight'"),
                         ({"objective": "original", "weights": {"penalty": 1.0}}, "penalty is a setting of its own")):
        with pytest.raises(SettingsError, match=words):
            validated(given, RunConfig)


def test_the_log_tells_what_happened(tmp_path):
    """Also of unequal rows in accumulated batches: what it says of the plan is a mean over real tokens, padding left out."""
    data, seen = Rows(), []
    record = DLRTrainer._record
    def noted(trainer, **values):
        seen.append(trainer.routing.plan)
        record(trainer, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DLRTrainer, "_record", noted)
        trained(tmp_path, data, batch_size=2, accumulation=2, steps=3)
    log = pd.read_csv(tmp_path / "log.csv")
    assert list(log["step"]) == [1, 2, 3]
    for column in ("ce", "kd", "budget", "skip", "goal", "gate_entropy", "temperature", "lr", "tokens_per_second"):
        assert log[column].notna().all(), column
    for step in range(3):
        kept = torch.cat([plan.kept for plan in seen[2 * step:2 * step + 2]])
        assert log["skip"][step] == pytest.approx(1 - kept.mean().item(), abs=1e-5)
        assert log[[f"keep_{i}" for i in range(4)]].loc[step].to_numpy() == pytest.approx(kept.mean(0).numpy(), abs=1e-5)
        shares = torch.cat([plan.logits[plan.real] for plan in seen[2 * step:2 * step + 2]]) - log["threshold"][step]
        assert log["gate_entropy"][step] == pytest.approx(gate_entropy(shares.sigmoid()), abs=1e-4)


def test_a_log_shows_no_temperature_where_no_gate_is_drawn(tmp_path):
    """A warm router whose share of the steps is 0 is not trained: its gates are hard, its threshold stays."""
    trained(tmp_path, Rows(equal=True), batch_size=4, steps=4, router_class="DepthRouter", warm_start=True,
            router_share=0.5)
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["temperature"].notna().tolist() == [True, True, False, False]
    assert log["threshold"][2:].nunique() == 1 and log["threshold"][:3].nunique() == 3


class Counting(torch.utils.data.Dataset):
    """Rows that count up from a start of their own: something to learn."""

    def __init__(self, starts):
        self.rows = [{"input_ids": (start + torch.arange(16)) % 90 + 2} for start in starts]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_training_learns_what_carries_over_and_a_cold_router_is_held_at_its_target(tmp_path):
    """At rising logits: nothing in the loss holds them, and a threshold moved by a fixed number of logits stays behind."""
    config = RunConfig(**{**SETTINGS, "steps": 60, "target_skip": 0.3, "batch_size": 8, "lora_rank": 8, "kd_weight": 0.0})
    set_seed(0)
    model = add_lora(tiny(), rank=config.lora_rank)
    routing = dlr.attach(model, config.router())
    held = torch.stack([row["input_ids"] for row in Counting(range(1, 90, 3)).rows])
    batch = [{"input_ids": held, "attention_mask": torch.ones_like(held), "row": torch.arange(len(held))}]
    untrained = perplexity(evaluate(model, routing, batch, None))
    DLRTrainer(model, config, Counting([s for s in range(90) if s % 3 != 1]), tmp_path).fit()
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["skip"][20:].mean() == pytest.approx(0.3, abs=0.045) and log["skip"][-10:].mean() == pytest.approx(0.3, abs=0.035)
    calibrate_router(model, routing, batch, 0.3)
    table = evaluate(model, routing, batch, RouterPolicy())
    assert perplexity(table) < 0.75 * untrained and skip_ratio(table) == pytest.approx(0.3, abs=0.01)


SCRIPT = """
import sys, time, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from pathlib import Path
import test_training as T
slow = T.DLRTrainer.step_done
def step_done(self, step):
    row = slow(self, step)
    print("step", step, flush=True)
    time.sleep({pause})
    return row
T.DLRTrainer.step_done = step_done
from dlr.train.stopping import EXIT, Stopped
try:
    weights = T.trained(Path({folder!r}), T.Rows(equal=True), batch_size=2, steps=12, save_steps=3)
except Stopped as stop:
    print(stop, flush=True)
    sys.exit(EXIT)
from safetensors.torch import save_file
save_file(weights, {folder!r} + "/end.safetensors")
"""


def _start(folder, pause):
    paths = [str(Path(__file__).parents[n]) for n in range(3)]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(paths=paths, folder=str(folder), pause=pause)],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert _start(folder, 0).wait(120) == 0
    return load_file(folder / "end.safetensors")


def _cut(folder, after, number):
    """(exit status, what it said last) of a run that gets a signal in its step `after`; it then goes on to its end."""
    process = _start(folder, 0.15)
    for line in process.stdout:
        if line.strip() == f"step {after}":
            time.sleep(0.05)
            os.kill(process.pid, number)
            break
    said = process.communicate(timeout=60)[0].strip().splitlines()
    kept = sorted(path.name for path in (folder / "trainer").glob("checkpoint-*"))
    assert not (folder / "end.safetensors").exists()
    assert _start(folder, 0).wait(120) == 0
    assert list(pd.read_csv(folder / "log.csv")["step"]) == list(range(1, 13))
    return process.returncode, said[-1:], kept


def _assert_same(whole, resumed):
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [2, 7])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, uninterrupted, kill_after):
    """kill -9 before the first checkpoint or after the second, then resume: bitwise what an uninterrupted run ends with."""
    status, _, _ = _cut(tmp_path / "killed", kill_after, signal.SIGKILL)
    assert status == -signal.SIGKILL
    _assert_same(uninterrupted, load_file(tmp_path / "killed" / "end.safetensors"))


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_the_step_in_progress_and_goes_on_to_the_same_weights(tmp_path, uninterrupted):
    """Its step 5, of which no checkpoint would be kept; a later one where this machine is slow to send."""
    status, said, kept = _cut(tmp_path / "stopped", 4, signal.SIGTERM)
    step = int(kept[0].removeprefix("checkpoint-"))
    assert status == EXIT and 5 <= step < 12 and len(kept) == 1
    assert said == [f"step {step} of 12 is saved; the same command goes on from there"]
    _assert_same(uninterrupted, load_file(tmp_path / "stopped" / "end.safetensors"))


def test_a_training_that_is_asked_to_end_after_its_last_step_is_begun_no_further(tmp_path):
    """A signal while that step is saved: a run has other variants, and would go on with them."""
    model = add_lora(tiny(), rank=2)
    dlr.attach(model, RouterConfig(always_keep=2))
    config = RunConfig(**SETTINGS | {"steps": 2})
    trainer = DLRTrainer(model, config, Rows(equal=True), tmp_path)
    save = trainer._save

    def asked(output_dir=None, state_dict=None):
        os.kill(os.getpid(), signal.SIGTERM)
        save(output_dir, state_dict)
    trainer._save = asked
    with pytest.raises(Stopped, match="step 2 of 2 is saved"):
        trainer.fit()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = DLRTrainer(model, config, Rows(equal=True), tmp_path)
    assert again.fit() == 2, "what is saved is whole"


def test_a_signal_that_somebody_else_heeds_stays_theirs():
    """As submitit's do, which queues a point again."""
    theirs = lambda number, frame: seen.append("theirs")
    before, seen = signal.signal(signal.SIGUSR2, theirs), []
    try:
        with heeding(lambda: seen.append("outer")), heeding(lambda: seen.append("inner")):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(os.getpid(), number)
        assert seen == ["inner", "theirs"] and signal.getsignal(signal.SIGUSR2) is theirs
        assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_rates_follow_the_schedule_after_the_warm_up(tmp_path):
    seen = {}
    for schedule in ("linear", "cosine", "constant"):
        model = add_lora(tiny(), rank=2)
        dlr.attach(model, RouterConfig(always_keep=2))
        config = RunConfig(**SETTINGS | {"steps": 10, "warmup": 0.2, "schedule": schedule, "weight_decay": 0.01,
                                         "adam_beta2": 0.999, "save_steps": 50})
        trainer = DLRTrainer(model, config, Rows(equal=True), tmp_path / schedule)
        trainer.fit()
        seen[schedule] = pd.read_csv(tmp_path / schedule / "log.csv")["lr"]
        assert all(group["weight_decay"] == 0.01 and group["betas"] == (0.9, 0.999) for group in trainer.optimizer.param_groups)
    ends = {name: rates.iloc[-1] for name, rates in seen.items()}
    assert ends["constant"] == pytest.approx(1e-2) and ends["linear"] == pytest.approx(0) == pytest.approx(ends["cosine"])
    assert seen["cosine"].iloc[3] > seen["linear"].iloc[3] and all(rates.iloc[0] == pytest.approx(5e-3) for rates in seen.values())


def test_distillation_can_begin_later(tmp_path):
    """With a warm-up of half of four steps, cross-entropy alone counts in two; no teacher runs."""
    model = add_lora(tiny(), rank=2)
    dlr.attach(model, RouterConfig(always_keep=2))
    config = RunConfig(**SETTINGS | {"steps": 4, "kd_weight": 0.8, "kd_warmup": 0.5, "objective": "global_penalty", "penalty": 0.0})
    trainer = DLRTrainer(model, config, Rows(equal=True), tmp_path)
    monkey, losses_seen = trainer.compute_loss, []

    def seen(*given, **more):
        loss = monkey(*given, **more)
        sums = trainer._sums
        ce, kd = (sums[name] / sums[f"{name} weight"] for name in ("ce", "kd"))
        weight = 0.8 if trainer.state.global_step >= 2 else 0.0
        assert bool(kd) == bool(weight)
        losses_seen.append((float(loss.detach()), (1 - weight) * ce + weight * kd))
        return loss
    trainer.compute_loss = seen
    trainer.fit()
    assert len(losses_seen) == 4 and all(loss == pytest.approx(expected, rel=1e-4) for loss, expected in losses_seen)


def test_lora_goes_where_it_is_asked_to():
    model = add_lora(tiny(), rank=2, targets=["q_proj", "v_proj"])
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="names z_proj, and the projections of this model are"):
        add_lora(tiny(), targets=["z_proj"])


def test_stochastic_depth_can_rise_with_depth():
    for probability in (0.0, 0.3, 0.5, 0.8):
        rising = LayerDrop(probability, "linear").probabilities(9)
        assert rising.mean() == pytest.approx(probability, abs=1e-6) and rising.diff().ge(0).all()
        assert rising.ge(0).all() and rising.lt(1).all()
        assert torch.equal(LayerDrop(probability).probabilities(9), torch.full((9,), probability))
