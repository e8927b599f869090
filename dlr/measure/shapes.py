"""Models to measure speed with, and recorded plans stretched over them.

Speed depends on shapes and on the plan, not on what the weights are.
"""

import torch
from torch.nn.functional import interpolate
from transformers import (AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig,
                          Qwen2Config)

from dlr.base import smollm2
from dlr.base.data import load_documents, padded_batches
from dlr.base.models import attention_of, source_of
from dlr.base.opened import load
from dlr.measure.evaluate import router_logits
from dlr.routing.budget import threshold_for
from dlr.routing.decoder import decoder_and_layers
from dlr.routing.handle import Routing

_QWEN = {"vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES = {
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        rms_norm_eps=1e-5),
    "openllama-3b": LlamaConfig(
        vocab_size=32000, hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
        num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6, pad_token_id=0),
    "qwen2.5-3b": Qwen2Config(
        **_QWEN | {"vocab_size": 151936}, hidden_size=2048, intermediate_size=11008,
        num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        tie_word_embeddings=True),
    "qwen2.5-7b": Qwen2Config(
        **_QWEN, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128001,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}),
}
_KNOWN = SHAPES | {                          # SmolLM2 is at hand: no stand-in of it is timed
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=True),
}
PUBLISHED = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
             "Qwen/Qwen2.5-3B": "qwen2.5-3b", "Qwen/Qwen2.5-7B": "qwen2.5-7b",
             "meta-llama/Llama-3.1-8B": "llama3.1-8b",
             "openlm-research/open_llama_3b_v2": "openllama-3b", smollm2.NAME: "smollm2-135m",
             "HuggingFaceTB/SmolLM2-135M": "smollm2-135m"}


def shape_of(model: str) -> PretrainedConfig:
    """The configuration of the base `model`; that of a published one needs no network.

    Raises:
        ConnectionError: it is neither known, nor here, nor reachable.
    """
    if model in PUBLISHED:
        return _KNOWN[PUBLISHED[model]]
    source = source_of(model)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:      # transformers raises both of what is not there
        raise ConnectionError(
            f"The shape of the model {model!r} is not known here: it is no local folder, and its "
            "config.json is neither in the Hub's cache nor could it be downloaded. Known without "
            f"a network: nano, {', '.join(PUBLISHED)}.") from error


def random_model(shape: str, layers: int | None, dtype: torch.dtype, device: str = "cpu",
                 attn_implementation: str | None = None):
    """A model of a published shape with random weights; `layers` caps its depth.

    Args:
        attn_implementation: as in `dlr.base.models.attention_of`.
    """
    config = type(SHAPES[shape])(**SHAPES[shape].to_diff_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    with torch.device("meta"):
        attention = attention_of(attn_implementation, str(dtype).removeprefix("torch."))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                 attn_implementation=attention)
    rotary = type(model.model.rotary_emb)(config=config)
    model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.tie_weights()
    return model.eval()


def capped(model, layers: int | None):
    """`model` without its layers after the first `layers` (None: as it is)."""
    if layers:
        del decoder_and_layers(model)[1][layers:]
        config = model.config.get_text_config()
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    return model


def recorded_logits(checkpoint: str, documents: int,
                    **loading) -> tuple[torch.Tensor, Routing]:
    """Router logits `[n, U]` of test documents, in reading order, and the handle of `checkpoint`.

    Args:
        checkpoint: as in `dlr.base.find.find_checkpoint`, a relative path from here or from the
            project's root; '' is the embedded router. The text is cut by the checkpoint's own
            tokenizer.
        loading: how the base of `checkpoint` is loaded, as in `dlr.load`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    model, tokenizer, routing = load(checkpoint or "nano-router", variant="routed", **loading)
    batches = padded_batches(load_documents("embedded", "test"), tokenizer, 256, 8, limit=documents)
    return router_logits(model, routing, batches)[0], routing


def recorded_gates(logits: torch.Tensor, units: int, skip: float) -> torch.Tensor:
    """Gates `[n, units]` with the pattern of recorded logits `[n, U]`, at exactly `skip`.

    A model of another depth gets the pattern stretched over its layers.
    """
    wide = interpolate(logits.float().unsqueeze(1), units, mode="linear", align_corners=True)[:, 0]
    generator = torch.Generator().manual_seed(0)
    wide = wide + 1e-4 * torch.rand(wide.shape, generator=generator)                  # no ties
    return (wide > threshold_for(wide, skip)).float()
