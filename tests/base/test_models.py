"""A base model comes from where its settings say: the revision that is named, safetensors, its own tokenizer."""

import json
import os

import pytest
from tiny_models import OPEN, tiny
from transformers import AutoTokenizer

import dlr
from dlr.__main__ import main
from dlr.base import encoding, models, opened
from dlr.base.models import load_base
from dlr.explore import opening
from dlr.measure import shapes
from dlr.routing.weights import base_record, identity
from dlr.settings import SettingsError, validated
from dlr.train.settings import RunConfig
from dlr.workbook import token_study
from dlr.workbook.phases import PHASES
from dlr.workbook.phases.latency import LatencyConfig

OPENLLAMA = "openlm-research/open_llama_3b_v2"


@pytest.fixture
def asked(monkeypatch, tokenizer):
    """What the Hub is asked for, as (kind, name, revision); it gives a tiny model."""
    seen = []

    def model(name, revision, **options):
        assert options["use_safetensors"]
        seen.append(("model", name, revision))
        net = tiny()
        net.config._name_or_path = name
        return net

    def tokens(name, revision=None, **options):
        seen.append(("tokenizer", name, revision))
        return tokenizer
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", model)
    for room in (models, encoding):
        monkeypatch.setattr(room.AutoTokenizer, "from_pretrained", tokens)
    return seen


def test_a_revision_is_asked_for_recorded_and_asked_for_again(asked, tmp_path):
    model, _ = load_base(OPENLLAMA, revision="refs/pr/12")
    assert asked == [("model", OPENLLAMA, "refs/pr/12"), ("tokenizer", OPENLLAMA, "refs/pr/12")]
    plain, _ = load_base(OPENLLAMA)
    assert asked[2:] == [("model", OPENLLAMA, "main"), ("tokenizer", OPENLLAMA, "main")]
    assert identity(model) == identity(plain), "weights tell models apart, not where they were found"
    assert "revision" not in base_record(plain)
    dlr.attach(model, OPEN)
    dlr.save_pretrained(model, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "router_config.json").read_text())["base"]["revision"] == "refs/pr/12"
    asked.clear()
    dlr.load(tmp_path / "c", say=lambda text: None)
    assert asked == [("model", OPENLLAMA, "refs/pr/12"), ("tokenizer", OPENLLAMA, "refs/pr/12")]
    asked.clear()
    dlr.load(tmp_path / "c", revision="main", say=lambda text: None)
    assert asked[0] == ("model", OPENLLAMA, "main")
    asked.clear()
    dlr.from_pretrained(tmp_path / "c", "somebody/copy")
    assert asked == [("model", "somebody/copy", "main")], "another repository has revisions of its own"


def test_what_has_no_revisions_refuses_one(tmp_path):
    for name in ("nano", "smollm2", str(tmp_path)):
        with pytest.raises(ValueError, match="names a version of a repository on the Hub, and .* is none"):
            load_base(name, revision="v1")
        with pytest.raises(SettingsError, match="is none; leave revision out"):
            validated({"model": name, "revision": "v1"}, RunConfig)
    with pytest.raises(SettingsError, match="leave revision out"):
        validated({"shape": "openllama-3b", "revision": "v1"}, LatencyConfig)
    assert validated({"model": OPENLLAMA, "revision": "v1"}, RunConfig).loading_base["revision"] == "v1"


@pytest.mark.parametrize("name, revision, words", [
    (OPENLLAMA, None, "Its revision 'refs/pr/12' has safetensors: set revision=refs/pr/12"),
    (OPENLLAMA, "refs/pr/12", "Ask for a safetensors copy"),
    ("somebody/else", None, "Ask for a safetensors copy"),
])
def test_a_repository_that_holds_a_pickle_is_refused_with_the_revision_that_does_not(monkeypatch, name, revision, words):
    def refuse(*given, **options):
        raise OSError(f"{name} does not appear to have a file named model.safetensors and thus cannot be loaded")
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ValueError) as error:
        load_base(name, revision=revision)
    assert "pickle only" in str(error.value) and words in str(error.value)
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1", "no web service makes another model of it meanwhile"


def test_a_vocabulary_of_sentencepiece_alone_is_read_as_sentencepiece_reads_it(tmp_path):
    """What OpenLLaMA's repository has: tokenizer.model, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the cat sat on the mat, and saw {n} dogs run over the house" for n in range(2000)))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=100,
                                             model_type="bpe", character_coverage=1.0, minloglevel=2,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for words in ("the cat saw 42 dogs", "a  mat , over", "house"):
        assert tokenizer(words, add_special_tokens=False)["input_ids"] == piece.encode(words)


def test_a_checkpoint_is_opened_alike_everywhere(monkeypatch):
    """dtype, 4 bit and attention reach `dlr.load` from the analysis, the explorer and the command line."""
    seen = []

    def stop(*given, **loading):
        seen.append({name: loading.get(name) for name in ("dtype", "load_in_4bit", "attn_implementation")})
        raise ValueError("that is all")
    for room in (token_study, opening, opened, shapes):
        monkeypatch.setattr(room, "load", stop)
    wanted = {"dtype": "bfloat16", "load_in_4bit": True, "attn_implementation": "eager"}
    flags = ["--dtype", "bfloat16", "--load-in-4bit", "--attn-implementation", "eager"]
    with pytest.raises(ValueError):
        token_study.open_study(validated(wanted, PHASES["token_analysis"].schema))
    with pytest.raises(ValueError):
        shapes.recorded_logits("x", 1, **validated(wanted, PHASES["latency"].schema).loading)
    with pytest.raises(ValueError):
        main(["explore", "a text", "--debug", *flags])
    with pytest.raises(ValueError):
        main(["eval", "nano-router", "--tasks", "embedded", "--debug", *flags])
    assert seen == [wanted] * 4
    for phase in ("evaluation", "explorer", "token_analysis", "latency", "baselines", "pareto"):
        assert validated(wanted, PHASES[phase].schema).loading == wanted, phase
