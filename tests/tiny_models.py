"""Tiny random models built from configurations; nothing here touches a network or a GPU."""

import copy
import random
from pathlib import Path

import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, BloomConfig, FalconConfig, Gemma2Config,
                          Gemma3TextConfig, GPT2Config, GPTNeoXConfig, GraniteConfig, LlamaConfig,
                          MistralConfig, Olmo2Config, OPTConfig, Phi3Config, Qwen2Config,
                          Qwen3Config, SmolLM3Config)

import dlr
from dlr.base.models import NANO
from dlr.routing.config import RouterConfig

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
PLAIN = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FAMILIES = {
    "llama": LlamaConfig(**SMALL), "qwen2": Qwen2Config(**SMALL), "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16), "phi3": Phi3Config(**SMALL),
    "olmo2": Olmo2Config(**SMALL), "gpt_neox": GPTNeoXConfig(**PLAIN),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0,
                       pad_token_id=1),
    "opt": OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=6, num_attention_heads=4,
                     max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=1, bos_token_id=0, eos_token_id=0),
    "mistral": MistralConfig(**SMALL, sliding_window=None), "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=16),
    "smollm3": SmolLM3Config(**SMALL), "granite": GraniteConfig(**SMALL, residual_multiplier=0.7),
    "falcon": FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, pad_token_id=1,
                           bos_token_id=0, eos_token_id=0),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=6, n_head=4, pad_token_id=1, bos_token_id=0,
                         eos_token_id=0),
}


def tiny(family: str = "llama", seed: int = 0):
    """A random model of six layers in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()


OPEN = RouterConfig(always_keep=2, keep_first_tokens=0)


def half_skipping(model, config=OPEN):
    """A router whose random logits close about half the gates."""
    torch.manual_seed(5)
    routing = dlr.attach(model, config)
    with torch.no_grad():
        routing.router.net[-1].weight.normal_(std=2.0)
        routing.router.net[-1].bias.zero_()
    return routing


DEPTH = RouterConfig(router_class="DepthRouter", always_keep=2, keep_first_tokens=1, book_depth=0.75)


def scattered(model, config=DEPTH, order=(2, 0, 3, 1)):
    """A depth router whose random harms differ from token to token."""
    torch.manual_seed(3)
    routing = dlr.attach(model, config)
    routing.router.set_order(list(order))
    with torch.no_grad():
        routing.router.net[-1].weight.normal_(std=1.0)
    return routing


def base_and_texts(folder: Path) -> dict[str, str]:
    """A tiny base with the embedded tokenizer and 300 documents, in folders; the settings that name them."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"vocab_size": 4096}, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder / "base")
    (folder / "texts").mkdir()
    rng = random.Random(0)
    for number in range(300):
        words = " ".join(rng.choice("the a cat dog tree runs sees under red old small".split()) for _ in range(80))
        (folder / "texts" / f"{number}.txt").write_text(f"{number} {words}")
    return {"model": str(folder / "base"), "dataset": str(folder / "texts")}


class Renamed(torch.nn.Module):
    """A Llama layer whose parts no family names so."""

    def __init__(self, layer):
        super().__init__()
        self.mixer, self.thinker = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mixer(hidden_states=self.before(hidden_states), **kwargs)[0]
        return hidden_states + self.thinker(self.between(hidden_states))
