"""All that DLR knows about model families by name. A family with other names is one entry here.

Parts are looked up by name in whatever model is given, not by its type: most families share names,
and one that is not listed is routed as well if its names are. `names` collects a column.
"""

from typing import NamedTuple

Names = tuple[str, ...]


class Family(NamedTuple):
    """What the code of some families calls the parts of a decoder layer."""
    attention: Names = ()       # the attention module of a layer
    mlp: Names = ()             # its MLP module
    bare_mlp: Names = ()        # the two matrices of an MLP without a module of its own
    query: Names = ()           # attention's query projection
    key_value: Names = ()       # its key and value projections
    fused: Names = ()           # one for queries, keys and values, which therefore sees every row
    output: Names = ()          # its output projection
    lora: Names = ()            # matrices that LoRA is put on
    ungated: Names = ()         # model types whose MLP has two matrices, where others have three
    cache: Names = ()           # a layer's argument that holds the key/value cache


FAMILIES = {
    "Llama and kin": Family(
        attention=("self_attn",), mlp=("mlp",), query=("q_proj",), key_value=("k_proj", "v_proj"),
        output=("o_proj",), cache=("past_key_values",),
        lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
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
        attention=("attn",), fused=("c_attn",), output=("c_proj",), cache=("layer_past",),
        lora=("c_attn", "c_proj", "c_fc"), ungated=("gpt2", "gpt_neo", "gptj")),
}

# What all families share, as transformers writes them.
CACHES = ("past_key_values", "cache_params")         # a decoder's argument that holds its cache
POSITIONS = ("position_embeddings", "position_ids", "cache_position")    # of a layer, by position
PLACE_FINDERS = ("arange", "get_seq_length", "get_query_offset")   # how attention finds places
ANY_MASK = ("sdpa", "eager")                         # attention functions that take any mask
# causal by themselves, by row number; their masks say which keys are padding
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
FLEX = "flex_attention"                              # its masks are functions of places


def names(column: str) -> Names:
    """All names in a column of the table, each once, in the table's order."""
    rows = (getattr(family, column) for family in FAMILIES.values())
    return tuple(dict.fromkeys(name for row in rows for name in row))
