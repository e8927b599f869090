"""Every shipped params file of a training phase plans, offline; the plan says what fits and what to change."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dlr import __main__ as command
from dlr.measure.shapes import PUBLISHED, SHAPES, shape_of
from dlr.runs import project_root
from dlr.train.rehearsal import Rehearsal
from dlr.train.settings import RunConfig
from dlr.workbook import planning
from dlr.workbook.phases import PHASES
from dlr.workbook.phases.training import TokenConfig
from dlr.workbook.plancommand import configs_of, described, size_of

FILES = [path for path in sorted((project_root() / "params").glob("*/*.yaml")) if path.parent.name in PHASES
         and issubclass(PHASES[path.parent.name].schema, RunConfig)]
STAND_IN = Rehearsal(Counter(base=3e9, LoRA=3e7), Counter(base=2e9, activations=1e9), 1e12)


@pytest.fixture(autouse=True)
def no_preset(monkeypatch):
    monkeypatch.delenv("DLR_PRESET", raising=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_params_file_plans(path, monkeypatch):
    """All but the step itself, which has a test of its own."""
    steps = []
    monkeypatch.setattr(planning, "rehearse", lambda *given, **options: steps.append(given) or STAND_IN)
    arguments = SimpleNamespace(phase=path.parent.name, params=str(path), set=[])
    configs = configs_of(arguments)
    assert configs
    for name, config in configs:
        plan = planning.forecast(path.parent.name, config, 1, 8e9)
        shape, taken = steps[-1][:2]
        assert shape.num_hidden_layers > taken.always_keep and taken.autocast is (config.bf16 is not False)
        assert plan.fits and (plan.trainings == 0 or plan.flops >= 1e12 * config.steps)
        assert plan.flops > 0 or getattr(config, "point", "") == "base"          # which is measured as it is
        assert any(line.startswith("needed: 3.65 GB of 8.00 GB: it fits") for line in
                   described(plan, config, 1, planning.CARDS["h100"], "h100"))


def config_of(model, **changes):
    return TokenConfig(**{"model": model, "dtype": "bfloat16", "gradient_checkpointing": True, "batch_size": 1,
                          "accumulation": 16, "seq_len": 1024, "variants": ["DLR"]} | changes)


@pytest.mark.slow
def test_the_three_billion_train_on_eight_gigabytes():
    qwen = "Qwen/Qwen2.5-3B"
    plan = planning.forecast("token_routing", config_of(qwen, load_in_4bit=True, router_hidden=512), memory=8e9)
    assert plan.fits and plan.needed <= 5e9
    assert plan.step.parameters["base"] + plan.step.parameters["rest"] == pytest.approx(3.086e9, rel=1e-3)
    assert 8 < plan.step.flops / 1024 / 3.086e9 < 9, "two passes forward, two of the teacher, two again, two backward"


@pytest.mark.slow
def test_the_eight_billion_train_on_twenty_four_gigabytes():
    plan = planning.forecast("token_routing", config_of("meta-llama/Llama-3.1-8B", router_hidden=1024), memory=24e9)
    assert plan.fits and plan.step.peak.total() > 16e9


def test_known_shapes_are_the_published_ones():
    """Those of SHAPES are counted in tests/measure/test_latency.py."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_of("smollm2"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert set(PUBLISHED.values()) == set(SHAPES) | {"smollm2-135m"} and shape_of("nano").num_hidden_layers == 16


def test_a_model_that_nobody_knows_is_refused_in_a_sentence(monkeypatch, capsys):
    def missing(name):
        raise OSError("offline")

    monkeypatch.setattr("dlr.measure.shapes.AutoConfig.from_pretrained", missing)
    assert command.main(["plan", "baselines", "--set", "model=someone/unknown"]) == 2
    assert "'someone/unknown' is not known here" in capsys.readouterr().err


def test_the_command_says_what_to_change_first(monkeypatch, capsys):
    """The embedded model needs little; a stand-in step grows with its settings."""
    def grown(shape, config, policy=None, processes=1, **options):
        held = config.batch_size // processes * config.seq_len * (1 if config.gradient_checkpointing else 8) * 1e6
        return Rehearsal(Counter(base=7e6), Counter(base=1e8, activations=held), 1e12)

    monkeypatch.setattr(planning, "rehearse", grown)
    order = ["plan", "baselines", "--set", "seq_len=512", "--set", "batch_size=4"]
    assert command.main([*order, "--memory", "80GB"]) == 0
    assert "it fits" in capsys.readouterr().out
    for memory, expected in (("4GB", "--set gradient_checkpointing=true\n"),
                             ("1.3GB", "=true --set batch_size=1 --set accumulation=4\n"),
                             ("1GB", "--set accumulation=4 --set seq_len=256 --set eval_len=256\n"),
                             ("0.5GB", "nothing here suffices")):
        assert command.main([*order, "--memory", memory]) == 1
        assert expected in capsys.readouterr().out
    assert command.main([*order, "--processes", "4", "--memory", "6GB", "--card", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "holds all of this, and computes 1 of the batch's 4 sequences" in shown and "on 4 x h100" in shown
    assert command.main([*order, "--processes", "4", "--memory", "6GB", "--set", "shard=true"]) == 0
    shown = capsys.readouterr().out
    assert "its part of the base" in shown and "base               0.04 GB" in shown, "a quarter of 0.10, and two layers of 16"


@pytest.mark.parametrize("given, message", [
    (["evaluation"], "evaluation trains nothing"), (["baselines", "--set", "batch_size=3", "--processes", "2"], "multiple of 2"),
    (["baselines", "--memory", "lots"], "'lots' is no size"), (["baselines", "--card", "abacus"], "is not one of"),
    (["baselines", "--params", str(project_root() / "params/pareto/nano.yaml")], "a sweep of pareto")])
def test_what_cannot_be_planned_is_refused(given, message, capsys):
    assert command.main(["plan", *given]) == 2
    assert message in capsys.readouterr().err


def test_sizes_and_a_sweeps_points():
    assert size_of("8GB") == 8e9 and size_of("24 GiB") == 24 * 2**30 and size_of("80") == 8e10
    path = project_root() / "params" / "pareto" / "tinyllama.yaml"
    points = yaml.safe_load(path.read_text())["grid"]
    configs = configs_of(SimpleNamespace(phase="pareto", params=str(path), set=[]))
    assert [config.point for _, config in configs] == [point["point"] for point in points], "seeds take the same"


def test_the_heaviest_of_the_variants_is_rehearsed():
    """A router that learns by gradients, with a teacher where one runs."""
    for variants, expected in ((["DLR", "v2"], ("original", 0.5)), (["DLR without KD", "best static"], ("controlled", 0.0)),
                               (["DLR without KD", "DLR"], ("controlled", 0.5)), (["best static"], ("controlled", 0.5))):
        config, policy = planning.heaviest("token_routing", config_of("nano", variants=variants))
        assert (config.objective, config.kd_weight) == expected and policy is None
        assert config.warm_start is (expected[0] == "controlled")


def test_preparation_is_counted_in_passes_at_full_depth():
    config = TokenConfig(model="smollm2", router_class="DepthRouter", skip_adapter_rank=8, label_tokens=1000,
                         adapter_tokens=500, order_tokens=100, candidates=1, book_plans=2, book_depth=1.0)
    tokens = planning.prepared_tokens("token_routing", config, shape_of("smollm2"))
    assert tokens["skip adapters"] == 500
    assert tokens["labels"] == pytest.approx(1000 * (1 + 4 / 30)), "the dense pass, and one of the four layers always kept"
    kept = sum((30 - dropped) / 30 * (26 if dropped == 1 else 1) for dropped in range(1, 27))
    assert tokens["static order"] == pytest.approx(100 * kept)


def test_validation_counts_the_text_of_every_time_it_is_measured():
    config = RunConfig(steps=50, eval_steps=20, validation_docs=10, eval_len=100)
    assert planning.validated_tokens(config) == 3 * 10 * 100, "after steps 20, 40 and the last"
    assert planning.validated_tokens(config.changed(steps=40)) == 2000
    assert planning.validated_tokens(config.changed(eval_steps=0)) == 0
