"""All that DLR knows about model families by name. A family whose parts have other names is one entry here.

Parts are looked up by name in whatever model is given, not by its type: most families share names, and one that is not
listed is routed as well if its names are. `names` collects a column of the table.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """What the code of some families calls the parts of a decoder layer. Each field is a tuple of names."""
    attention: tuple[str, ...] = ()       # the attention module of a layer
    mlp: tuple[str, ...] = ()             # its MLP module
    bare_mlp: tuple[str, ...] = ()        # the two matrices of an MLP without a module of its own
    query: tuple[str, ...] = ()           # attention's query projection
    key_value: tuple[str, ...] = ()       # its key and value projections
    fused: tuple[str, ...] = ()           # one for queries, keys and values, which therefore sees every row
    output: tuple[str, ...] = ()          # its output projection
    lora: tuple[str, ...] = ()            # matrices that LoRA is put on
    ungated: tuple[str, ...] = ()         # model types whose MLP has two matrices, where others have three
    cache: tuple[str, ...] = ()           # a layer's argument that holds the key/value cache


FAMILIES = {
    "Llama and kin": Family(
        attention=("self_attn",), mlp=("mlp",), query=("q_proj",), key_value=("k_proj", "v_proj"), output=("o_proj",),
        lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        cache=("past_key_values",)),
    "Llama 4": Family(mlp=("feed_forward",)),
    "Phi-3": Family(fused=("qkv_proj",), lora=("qkv_proj", "gate_up_proj")),
    "OPT, Phi, StarCoder 2": Family(
        bare_mlp=("fc1", "fc2"), output=("out_proj", "dense"), lora=("out_proj", "fc1", "fc2"),
        ungated=("opt", "phi", "starcoder2")),
    "GPT-NeoX, Falcon, BLOOM": Family(
        attention=("attention", "self_attention"), fused=("query_key_value",), output=("dense",),
        lora=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ungated=("gpt_neox", "falcon", "bloom")),
    "GPT-2, GPT-Neo, GPT-J": Family(
        attention=("attn",), fused=("c_attn",), output=("c_proj",), lora=("c_attn", "c_proj", "c_fc"),
        ungated=("gpt2", "gpt_neo", "gptj"), cache=("layer_past",)),
}

# -- what all families share, as transformers writes them -----------------------------------------------------
CACHES = ("past_key_values", "cache_params")               # a decoder's argument that holds its cache
POSITIONS = ("position_embeddings", "position_ids", "cache_position")     # a layer's arguments that go with positions
PLACE_FINDERS = ("arange", "get_seq_length", "get_query_offset")          # how attention code finds places by itself
ANY_MASK = ("sdpa", "eager")                               # attention functions that take any mask


def names(column: str) -> tuple[str, ...]:
    """All names in a column of the table, each once, in the table's order."""
    return tuple(dict.fromkeys(name for family in FAMILIES.values() for name in getattr(family, column)))
