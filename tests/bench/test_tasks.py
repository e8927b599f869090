"""Local benchmark files, checkpoint discovery, variants, FLOPs and the eval command, as a user meets them."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from local_tasks import write_tasks
from tiny_models import tiny
from torch.utils.flop_counter import FlopCounterMode

import dlr
from dlr.__main__ import main
from dlr.base.checkpoint import save_control
from dlr.base.data import read_wikitext, wikitext_articles
from dlr.base.find import HalfWritten, checkpoints, find_checkpoint
from dlr.base.models import add_lora, load_base
from dlr.base.opened import load
from dlr.base.restore import WrongBase
from dlr.bench.tasks import BadRow, UnknownTask, load_tasks, local_rows
from dlr.bench.wikitext import load_articles
from dlr.measure.flops import (active_halves, flops_per_token, layer_flops, plan_flops_per_token,
                               text_flops)
from dlr.routing.attach import attach
from dlr.routing.config import RouterConfig
from dlr.settings import SettingsError

SHARED = Path(os.environ.get("DLR_BENCHMARK_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not (SHARED / "mmlu").is_dir(), reason="the real benchmark files are not here: set "
                                  "DLR_BENCHMARK_DATA to a folder in the forms of dlr/bench/tasks.py")


@pytest.fixture
def data(tmp_path):
    return write_tasks(tmp_path / "data")


# -- local files --------------------------------------------------------------------------------------------------------
def test_prompts_are_the_harness_own_templates(data):
    loaded = load_tasks(["mmlu_anatomy", "arc_challenge", "gsm8k", "blimp_causative"], str(data), 2)["tasks"]
    for task in loaded.values():
        task.build_all_requests(limit=1)
    prompt, answer = loaded["mmlu_anatomy"].instances[1].args
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nWhat is")
    assert prompt.count("Answer:") == 3 and answer == " B"
    assert "\nAnswer: A\n\n" in prompt                                      # the first dev row, whose answer is 0
    assert loaded["arc_challenge"].instances[0].args[0].endswith("Question: Which is a array, 0?\nAnswer:")
    assert loaded["gsm8k"].instances[0].args[0].count("#### ") == 2
    assert loaded["blimp_causative"].config.num_fewshot == 0                # the definition fixes it
    assert loaded["blimp_causative"].instances[0].args[0] == ""


def test_arc_examples_never_hold_the_scored_row(data):
    task = load_tasks(["arc_challenge"], str(data), 5)["tasks"]["arc_challenge"]
    task.build_all_requests()
    for instance in task.instances:
        assert instance.args[0].count(instance.doc["question"]) == 1


BROKEN = {
    "arc/arc_challenge.jsonl": ("arc_challenge", '{"query": "Question: x", "choices": ["a", "b"], "gold": 2}\n', "gold=2"),
    "gsm8k/test.jsonl": ("gsm8k", '{"question": "x", "answer": "five"}\n', "####"),
    "gsm8k/train.jsonl": ("gsm8k", '{"question": "x", "ans\n', "not JSON"),
    "blimp/data/causative.jsonl": ("blimp_causative", '{"sentence_good": "x"}\n', "sentence_bad"),
    "mmlu/test/anatomy_test.csv": ("mmlu_anatomy", '"two\nlines",a,b,c,d,4\r\n', "0 to 3")}


@pytest.mark.parametrize("file", BROKEN)
def test_a_malformed_row_is_named_by_file_and_line(data, file):
    task, row, reason = BROKEN[file]
    path = data / file
    before = path.read_text(encoding="utf-8")
    path.write_text(before + row, encoding="utf-8")
    with pytest.raises(BadRow, match=reason) as error:
        load_tasks([task], str(data))
    assert f"{path}, line {len(before.splitlines()) + 1}:" in str(error.value)


def test_a_headerless_table_and_other_encodings_are_named(data):
    table, lines = data / "mmlu" / "dev" / "anatomy_dev.csv", data / "gsm8k" / "train.jsonl"
    table.write_text("\n".join(table.read_text(encoding="utf-8").splitlines()[2:]) + "\n", encoding="utf-8")
    with pytest.raises(BadRow, match="anatomy_dev.csv, line 1: .*header"):
        load_tasks(["mmlu_anatomy"], str(data))
    table.write_bytes(b"question,a,b,c,d,answer\n\xff\xfe,a,b,c,d,0\n")
    with pytest.raises(BadRow, match="anatomy_dev.csv, line .*UTF-8"):
        load_tasks(["mmlu_anatomy"], str(data))
    lines.write_bytes(lines.read_bytes() + b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(BadRow, match="train.jsonl, line 8: not UTF-8"):
        load_tasks(["gsm8k"], str(data))


def test_more_examples_than_there_are_is_said(data, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "results"))
    assert main(["eval", "nano", "--tasks", "mmlu_anatomy", "--num-fewshot", "99", "--data-dir", str(data)]) == 2
    assert "refuses mmlu_anatomy" in capsys.readouterr().err
    assert main(["eval", "nano", "--tasks", "gsm8k", "--num-fewshot", "-1", "--data-dir", str(data)]) == 2


def test_absent_files_and_folders_are_named(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="astronomy"):
        load_tasks(["mmlu_astronomy"], str(data))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tasks(["gsm8k"], str(tmp_path / "nowhere"))
    (data / "gsm8k" / "test.jsonl").write_text("")
    with pytest.raises(BadRow, match="no row"):
        load_tasks(["gsm8k"], str(data))


def test_no_network_names_the_data_folder(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="--data-dir"):
        load_tasks(["hellaswag"])
    with pytest.raises(ConnectionError, match="--data-dir"):
        load_articles()


@pytest.mark.slow
def test_an_unknown_task_gives_the_nearest_names(capsys):
    with pytest.raises(UnknownTask, match="arc_challenge"):
        load_tasks(["arc_chalenge"])
    assert main(["eval", "nano", "--tasks", "blimb"]) == 2
    assert "blimp" in capsys.readouterr().err


@needs_shared
def test_all_real_local_files_load():
    folder = str(SHARED)
    for form, group, count in (("mmlu", "mmlu", 57), ("blimp", "blimp", 67)):
        tasks = load_tasks([group], folder)["tasks"]
        assert len(tasks) == count
        sizes = [len(task.eval_docs) for task in tasks.values()]
        assert sum(sizes) == {"mmlu": 14042, "blimp": 67000}[form]
    assert len(local_rows("arc", "ARC-Challenge", folder)["test"]) == 1172
    assert {k: len(v) for k, v in local_rows("gsm8k", "main", folder).items()} == {"train": 7473, "test": 1319}
    found = load_articles(folder)
    assert len(found) > 50 and all(text.startswith(" = ") for text in found)
    assert abs(sum(len(text.split()) for text in found) - 241211) < 5000


@needs_shared
@pytest.mark.slow
def test_every_real_task_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path))
    tasks = "mmlu_anatomy,arc_challenge,gsm8k,blimp_causative,wikitext103"
    assert main(["eval", "nano", "--tasks", tasks, "--num-fewshot", "5", "--limit", "1", "--data-dir", str(SHARED)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("gsm8k", "ppl/word", "cut on the left", "note: few-shot"))


def test_one_column_csv_is_joined_and_faults_are_placed(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text('""\n" = One = \n"\n" a ""b"" c\n"\n" = = Part = = \n"\n" = Two = \n"\n')
    assert wikitext_articles(read_wikitext(path)) == [' = One = \n a "b" c\n = = Part = = \n', " = Two = \n"]
    path.write_text('" = One = \n"\n"a","b"\n')
    with pytest.raises(ValueError, match="line 3"):
        read_wikitext(path)


# -- the command --------------------------------------------------------------------------------------------------------
def test_the_command_evaluates_resumes_and_reports(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "results"))
    command = ["eval", "nano", "--tasks", "blimp_causative,arc_challenge,wikitext103", "--limit", "3", "--num-fewshot", "1",
               "--data-dir", str(data)]
    assert main(command) == 0
    folder = tmp_path / "results" / "evaluation" / "nano-base"
    first = json.loads((folder / "metrics.json").read_text())
    assert main(command) == 0
    assert "3 of 3 tasks were finished before" in capsys.readouterr().out
    again = json.loads((folder / "metrics.json").read_text())
    assert again["rows"] == first["rows"] and first["harness"]["base"]["n-shot"]["arc_challenge"] == 1
    assert str(tmp_path) not in (folder / "metrics.json").read_text() + (folder / "run.json").read_text()
    assert first["environment"]["lm_eval"] and json.loads((folder / "run.json").read_text())["git_commit"] is not None


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "--tasks", "gsm8k"], "neither a folder nor a phase"),
    (["nano", "--tasks", "gsm8k", "--limit", "-1"], "above 0"),
    (["nano", "--tasks", " , "], "at least one name"),
    (["nano", "--tasks", "gsm8k", "--variant", "static"], "without a router"),
    (["nano", "--tasks", "embedded", "--limit", "1", "--name", "../../x"], "run_name='../../x'"),
    (["nano", "--tasks", "embedded", "--name", ".."], "not a way up"),
    (["nano", "--tasks", "embedded", "--order", "pareto"], "no use for order")])
def test_bad_arguments_get_one_sentence(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


# -- checkpoints --------------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path):
    """A run folder with a routed checkpoint of the embedded model, and metrics with a static order."""
    run = tmp_path / "results" / "pareto" / "run"
    model, _ = load_base()
    model = add_lora(model, rank=2)
    attach(model).calibration.skip = 0.25
    dlr.save_pretrained(model, run / "router" / "checkpoint")
    rows = [{"variant": "DLR", "skip": 0.3}, {"variant": "best static", "order": list(range(11, -1, -1))}]
    (run / "metrics.json").write_text(json.dumps({"rows": rows}))
    return run / "router" / "checkpoint"


def test_a_phase_means_the_newest_complete_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "results"))
    (checkpoint.parents[1].with_name("unfinished") / "router" / "checkpoint").mkdir(parents=True)
    said = []
    assert find_checkpoint("pareto", said.append) == checkpoint and "newest complete run" in said[0]
    assert find_checkpoint(checkpoint.parents[1], said.append) == checkpoint
    assert find_checkpoint(checkpoint, said.append) == checkpoint
    assert find_checkpoint("pareto/run/router", said.append) == checkpoint == checkpoints()["pareto/run/router"]
    (tmp_path / "results" / "baselines").mkdir()
    with pytest.raises(FileNotFoundError, match="None of the 0 complete runs"):
        find_checkpoint("baselines")


def test_half_written_checkpoints_are_skipped_aloud(checkpoint, tmp_path):
    variant = checkpoint.parent
    last = variant / "trainer" / "checkpoint-20"
    shutil.copytree(checkpoint, last)
    (last / "trainer_state.json").write_text("{}")
    shutil.copytree(last, variant / "trainer" / "checkpoint-30")
    (variant / "trainer" / "checkpoint-30" / "trainer_state.json").unlink()       # killed while it was written
    weights = (checkpoint / "router.safetensors").read_bytes()
    (checkpoint / "router.safetensors").write_bytes(weights[:len(weights) // 2])
    said = []
    with pytest.warns(HalfWritten) as warned:
        assert find_checkpoint(variant, said.append) == last
    assert len(warned) == 2 and "last of router" in said[0]
    with pytest.raises(FileNotFoundError, match="half-written"):
        find_checkpoint(checkpoint)
    shutil.rmtree(variant / "trainer")
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        warnings.simplefilter("ignore")
        find_checkpoint(variant)


def test_variants_of_one_checkpoint(checkpoint):
    routed = load(str(checkpoint))
    model, tokenizer, routing = routed
    assert routing is dlr.routing_of(model) and routing.policy is routed.policy and tokenizer.bos_token
    assert routed.kind == "routed" and routed.routing.calibration.skip == 0.25
    static = load(str(checkpoint), variant="static")                             # the row of its own folder: DLR's
    dropped = (static.policy.plans == 0).sum(1).tolist()
    assert dropped == [3, 4] and static.policy.share_more == pytest.approx(0.3 * 12 - 3)     # the router's measured skip
    assert not static.policy.plans[0, 9:].any()                                              # along the stored order
    assert load(str(checkpoint), variant="dense").policy is None
    assert load(str(checkpoint), variant="stochastic", skip=0.5).policy.skip == 0.5
    assert len({load(str(checkpoint), variant=v).digest for v in ("routed", "static", "dense")}) == 3
    with pytest.raises(ValueError, match="no calibration curve"):
        load(str(checkpoint), skip=0.3)
    (checkpoint.parents[1] / "metrics.json").unlink()
    with pytest.raises(SettingsError, match="--order"):
        load(str(checkpoint), variant="static")


def test_a_measured_skip_is_not_taken_from_another_checkpoints_row(checkpoint):
    other = checkpoint.parents[1] / "cold" / "checkpoint"
    shutil.copytree(checkpoint, other)
    assert load(str(other), variant="static").policy.share_more == 0                # its own calibrated 0.25: 3 of 12
    path = checkpoint.parents[1] / "metrics.json"
    rows = json.loads(path.read_text())["rows"]
    path.write_text(json.dumps({"rows": [*rows, {"variant": "cold", "skip": 0.5}, {"variant": "cold, mean plan", "skip": 0.9}]}))
    assert (load(str(other), variant="static").policy.plans == 0).sum(1).tolist() == [6, 7]
    run = str(checkpoint.parents[1])
    assert load(str(checkpoint), variant="static", order=run).policy.share_more == 0   # an order that was named: calibrated


@pytest.fixture
def healed():
    """The embedded model with LoRA that was trained, and a router that stands for a plan."""
    model, _ = load_base()
    model = add_lora(model, rank=2)
    routing = attach(model, RouterConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model, routing


def test_a_healed_control_is_saved_and_loaded_with_its_plan(healed, tmp_path, ids):
    model, routing = healed
    order = [3, 1, 0, 2, 11, 10, 9, 8, 7, 6, 5, 4]
    save_control(model, routing, tmp_path / "static" / "checkpoint", "static", order, 0.25)
    loaded = load(str(tmp_path / "static"))
    assert loaded.kind == "static" and loaded.policy.share_more == 0
    assert (loaded.policy.plans[0] == 0).nonzero().flatten().tolist() == [0, 1, 3]
    with routing.using(None), loaded.routing.using(None):
        assert torch.equal(model(ids).logits, loaded.model(ids).logits)
    with pytest.raises(SettingsError, match="no router"):
        load(str(tmp_path / "static"), variant="routed")
    with pytest.raises(SettingsError, match="no use for order .a static control holds its own"):
        load(str(tmp_path / "static"), order="pareto")
    with pytest.raises(FileNotFoundError, match="static control and has no router"):
        dlr.from_pretrained(tmp_path / "static" / "checkpoint")


def test_a_stochastic_control_runs_as_it_was_trained_or_not_at_all(healed, tmp_path):
    folder = tmp_path / "stochastic" / "checkpoint"
    save_control(*healed, folder, "stochastic", skip=0.5)
    assert load(str(folder)).policy.skip == 0.5
    assert load(str(folder), skip=0.2).policy.skip == 0.2
    assert load(str(folder), variant="dense").policy is None
    save_control(*healed, folder, "stochastic")
    with pytest.raises(SettingsError, match="--skip"):
        load(str(folder))
    save_control(*healed, folder, "dense")
    assert load(str(folder)).policy is None
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "control.json"]


@pytest.mark.parametrize("name, options, idle", [
    ("nano", {"skip": 0.3}, "skip"), ("nano", {"order": "pareto"}, "order"), ("nano", {"model": "nano"}, "model"),
    ("nano-router", {"order": "pareto"}, "order"), ("nano-router", {"variant": "dense", "skip": 0.3}, "skip"),
    ("nano-router", {"variant": "stochastic", "skip": 0.3, "order": "pareto"}, "order")])
def test_what_a_variant_has_no_use_for_is_refused(name, options, idle):
    with pytest.raises(SettingsError, match=f"has no use for {idle}"):
        load(name, **options)


def test_ways_to_load_a_base_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="dtype='half' is not one of float32"):
        load("nano", dtype="half")
    with pytest.raises(SettingsError, match="is a checkpoint"):
        load("nano-router", variant="base")


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    """Another model with the same norms: one matrix is half as large again."""
    model, tokenizer = load_base()
    base = load("nano")
    assert base.kind == "base" and tuple(base)[2] is None
    before = base.digest
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase, match="cannot be loaded"):
        load("nano-router", model=str(tmp_path / "other"))
    assert len({before, load(str(tmp_path / "other")).digest, load("nano", dtype="bfloat16").digest}) == 3


# -- FLOPs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_the_closed_form_is_what_the_counter_counts(family):
    """Eager attention, whole score matrices: every token attends to all s in the counter, so context = s."""
    model, length = tiny(family), 12
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(2, 2 + length).unsqueeze(0))
    # Rotary angles are a small matrix product in most families; they are no part of the closed form.
    expected = flops_per_token(model.config, model.config.num_hidden_layers, length)
    assert counter.get_total_flops() / length == pytest.approx(expected, rel=0.005)


def counted(model, length=12):
    """FLOPs a token; eager attention, and what a replaced half returns costs nothing."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(2, 2 + length).unsqueeze(0))
    return counter.get_total_flops() / length


def test_halves_of_a_layer_cost_what_the_counter_counts():
    """Attention and MLP are gated apart: each half that is left out saves its own products, and keys and values stay."""
    model, rates = tiny(), {"attention": [0.0, 1.0, 1.0, 1.0], "mlp": [1.0, 0.0, 1.0, 1.0], "neither": [1.0] * 4}
    model.set_attn_implementation("eager")
    layer, found = model.model.layers[2], {"neither": counted(model)}
    keys_values = layer_flops(model.config, 12)[0]
    mlp, attention = layer.mlp.forward, layer.self_attn.forward
    layer.mlp.forward = torch.zeros_like
    found["mlp"] = counted(model)
    layer.mlp.forward, layer.self_attn.forward = mlp, lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    found["attention"] = counted(model) + keys_values
    layer.self_attn.forward = attention
    for half, rate in rates.items():
        expected = plan_flops_per_token(model.config, 12, rate, always_keep=2, keep_last=2)
        assert found[half] == pytest.approx(expected, rel=0.005), half
        active = active_halves(torch.tensor([rate]), 4, 2)
        assert text_flops(model.config, active, torch.tensor([11])) == pytest.approx(expected), half
    assert found["attention"] != pytest.approx(found["mlp"], rel=0.01)


def test_skipping_everything_still_pays_for_keys_and_values():
    config = tiny().config
    width, kv = config.hidden_size, 2 * config.hidden_size // 4
    dense, skipped = flops_per_token(config, 6, 10), plan_flops_per_token(config, 10, [0.0] * 4, always_keep=2)
    prefix = plan_flops_per_token(config, 10, [0.0] * 6)
    assert plan_flops_per_token(config, 10, [1.0] * 4, always_keep=2) == dense
    assert prefix == 6 * 2 * 2 * width * kv + 2 * width * config.vocab_size
    assert prefix < skipped < dense
    with pytest.raises(ValueError, match="do not fit"):
        plan_flops_per_token(config, 10, [1.0] * 3, always_keep=2)
