"""Every phase on a stand-in of each published architecture: its class and quirks, its proportions, random weights.

8:1 and 7:1 key/value groups, as many heads of an odd size, biases, tied embeddings, `llama3` positions.
"""

import random

import pytest
import torch
from tiny_models import SMALL
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dlr.base.models import load_base
from dlr.measure import evaluate, latency, shapes
from dlr.routing.policy import RouterPolicy
from dlr.settings import Settings
from dlr.train import prepare
from dlr.workbook import evaluation, frontier, study, token_study
from dlr.workbook.phases import PHASES
from dlr.workbook.phases.evaluation import VariantSpec
from dlr.workbook.phases.training import NotebookConfig
from dlr.workbook.places import open_run

SIZES = {"tinyllama-1.1b": (64, 8, 1, 176), "openllama-3b": (80, 4, 4, 216), "qwen2.5-3b": (64, 8, 1, 344),
         "qwen2.5-7b": (56, 7, 1, 296), "llama3.1-8b": (64, 8, 2, 224)}        # width, heads, key/value heads, MLP
DEPTH = NotebookConfig.toy | {
    "router_class": "DepthRouter", "router_hidden": 16, "skip_adapter_rank": 2, "lora_prefix": False}
WORDS = "the a cat dog house tree runs sees under over with and red blue old small water light".split()


def stand_in(shape: str):
    width, heads, groups, inner = SIZES[shape]
    config = shapes.SHAPES[shape]
    given = {name: value for name, value in config.to_diff_dict().items() if name not in ("head_dim", "layer_types")}
    tokens = {name: SMALL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "num_hidden_layers")}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(config)(**given | tokens | {
        "vocab_size": 320, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": inner, "initializer_range": 0.2}))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("data") / "texts", random.Random(0)
    place.mkdir()
    for number in range(120):
        (place / f"{number}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(60)))
    (articles := place.parent / "wikitext-103").mkdir()
    (articles / "test.txt").write_text(" = Title = \n" + (place / "0.txt").read_text() + "\n")
    return place


@pytest.fixture(scope="module")
def tokenizer(texts):
    """A vocabulary of a size at which products with the head take no time."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([path.read_text() for path in texts.iterdir()], vocab_size=320, show_progress=False,
                            special_tokens=["<s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


@pytest.fixture(params=SIZES)
def folder(request, tmp_path, monkeypatch, tokenizer):
    """The stand-in's folder, among results and a cache of its own."""
    stand_in(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(prepare, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(evaluate, "BOOTSTRAP", 20)          # intervals are tested elsewhere
    return tmp_path / "base"


def begun(notebook: str, folder, texts, name: str = "toy", **changes) -> tuple[Settings, object]:
    """(toy settings of a phase, its run)."""
    schema = PHASES[notebook].schema
    common = {"model": str(folder), "dataset": str(texts), "always_keep": 2, "keep_first_tokens": 1, "eval_docs": 4,
              "run_name": name}
    known = {key: value for key, value in common.items() if key in schema.model_fields}
    config = schema(**schema.toy | known | changes)
    return config, open_run(notebook, config, say=lambda text: None)


def baselines(folder, texts):
    config, run = begun("baselines", folder, texts)
    bench = study.open_bench(config)
    rows = [study.base_row(bench), study.dense_row(bench, config, run.folder / "dense")]
    return run.finish(rows + study.stochastic_rows(bench, config, run.folder / "stochastic", config.dropped))["rows"]


def sequence(folder, texts):
    config, run = begun("sequence_routing", folder, texts)
    bench = study.open_bench(config)
    variant = study.train(bench, "lambda = 1", config.changed(penalty=1.0), run.folder / "lambda-1")
    rows = [study.measure(bench, variant, "lambda = 1", RouterPolicy())]
    variant.close()
    return run.finish(rows)["rows"]


def token_routing(folder, texts, in_4bit: bool):
    config, run = begun("token_routing", folder, texts, "packed" if in_4bit else "plain", load_in_4bit=in_4bit,
                        dtype="bfloat16", **DEPTH)
    bench = study.open_bench(config)
    packed = any("4bit" in type(module).__name__ for module in bench.base.modules())
    assert packed == in_4bit and bench.base.model.layers[0].input_layernorm.weight.dtype in (torch.bfloat16, torch.float32)
    variant = study.train(bench, "DLR", config, run.folder / "DLR")
    rows = study.routed_rows(bench, variant)
    variant.close()
    return run.finish(rows)["rows"]


def pareto(folder, texts):
    config, run = begun("pareto", folder, texts, point="router", **DEPTH | {"budgets": [0.25, 0.5]})
    rows = frontier.MEASURES["router"](study.open_bench(config), config, run)["rows"]
    return [row for row in rows if row["kind"] in ("routed", "static")]


def evaluated(folder, texts):
    phases = ["baselines", "sequence_routing", "token_routing"]
    full = VariantSpec(name="stochastic, full", checkpoint="baselines/toy/stochastic", variant="dense")
    config, run = begun("evaluation", folder, texts, phase=phases, tasks=["wikitext103"], dataset="embedded",
                        data_dir=str(texts.parent), variants=[full])
    return evaluation.evaluate_variants(config, run.folder, say=lambda text: None)[0]


def analysed(folder, texts):
    config, run = begun("token_analysis", folder, texts, checkpoint="pareto/toy", record_docs=3, oracle_docs=2, oracle_len=16,
                        probe_docs=3, eval_len=24)
    return token_study.measure(config, run)


def timed(folder):
    logits, trained = shapes.recorded_logits("pareto/toy", 1)
    model, _ = load_base(str(folder))
    subject = latency.subject("stand-in", logits, [0.5], model=model, trained=trained)
    return [latency.measure(work, [0.5], repeats=1) for work in
            (latency.Prefill(subject, 1, 32), latency.Decode(subject, 2, 8, steps=2))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Plans run masked")
def test_every_phase_runs_on_a_stand_in(folder, texts):
    rows = {row["variant"]: row for row in baselines(folder, texts)}
    assert {row["kind"] for row in rows.values()} == {"base", "dense", "stochastic"}
    assert rows["stochastic depth, 40% dropped"]["skip"] == pytest.approx(0.4, abs=0.1)
    (routed,) = sequence(folder, texts)
    assert 0 <= routed["skip"] <= 1
    for in_4bit in (False, True):
        routed, *controls = token_routing(folder, texts, in_4bit)
        assert routed["skip"] == pytest.approx(0.4, abs=0.15) and controls[0]["skip"] == pytest.approx(routed["skip"])
    points = pareto(folder, texts)
    assert [(row["kind"], row["target_skip"]) for row in points] == [
        ("routed", 0.25), ("routed", 0.5), ("static", 0.25), ("static", 0.5)]
    table = evaluated(folder, texts)
    assert [row["variant"] for row in table] == [
        "base", "baselines, toy, dense", "baselines, toy, stochastic", "sequence_routing, toy, lambda-1",
        "token_routing, packed, DLR", "token_routing, plain, DLR", "stochastic, full"]
    assert all(row["perplexity"] for row in table)
    metrics = analysed(folder, texts)
    assert metrics["rows"][0]["oracle"] <= metrics["rows"][0]["static"] + 1e-3
    for table in timed(folder):
        assert (table["tokens_per_second"] > 0).all() and "compact" in set(table["system"])
