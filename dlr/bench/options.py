"""What a user of lm-evaluation-harness may ask of a DLR model, and what is refused and why."""

import difflib
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from dlr.base.models import DTYPES
from dlr.settings import SettingsError

OPENING = ("variant", "skip", "order", "model", "dtype", "load_in_4bit", "attn_implementation",
           "revision")
PASSED_ON = ("truncation", "softmax_dtype", "mixed_precision_dtype", "add_bos_token",
             "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args")
REFUSED = {
    "logits_cache": "it reuses logits between requests, which hides them from the router's watch",
    "trust_remote_code": "code from the Hub is never run",
    "load_in_8bit": "4 bit is what there is; give load_in_4bit=True",
    **dict.fromkeys(("peft", "delta"), "adapters come with the checkpoint"),
    **dict.fromkeys(("pretrained", "backend", "tokenizer", "subfolder", "use_fast_tokenizer",
                     "gguf_file", "autogptq", "gptqmodel"),
                    "the base model and its tokenizer are those the checkpoint names; give "
                    "model=NAME for another place of the same"),
    **dict.fromkeys(("parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory",
                     "offload_folder", "tp_plan"), "the model runs whole on one device; give "
                                                   "device")}

_PRECISION = (Literal["auto", *DTYPES], f"auto, {', '.join(DTYPES)}")
# The type of each option, and what an error says it must be; others are taken as they come.
_TYPES = {
    **dict.fromkeys(("model", "order", "attn_implementation", "revision"), (str, "text")),
    **dict.fromkeys(("load_in_4bit", "add_bos_token", "truncation"), (bool, "true or false")),
    **dict.fromkeys(("softmax_dtype", "mixed_precision_dtype"), _PRECISION),
    "batch_size": (PositiveInt | Literal["auto"], "a whole number of at least 1, or auto"),
    **dict.fromkeys(("max_length", "max_batch_size"),
                    (PositiveInt, "a whole number of at least 1")),
    "prefix_token_id": (NonNegativeInt, "a token's number"),
    "skip": (float, "a number")}


def checked(options: dict, others: list[str]) -> dict:
    """The harness's options that act on a loaded model; what is unknown or idle is refused.

    `others` are the names of the options that are DLR's own.
    """
    for name, value in options.items():
        if name in REFUSED and value not in (None, False):
            raise SettingsError(f"{name}={value!r} cannot be used with DLR checkpoints: "
                                f"{REFUSED[name]}.")
        if name not in (*PASSED_ON, *REFUSED):
            known = [*others, *PASSED_ON]
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}."
            raise SettingsError(f"There is no model argument {name!r}{remedy}")
    return {name: value for name, value in options.items() if name in PASSED_ON}


def typed(options: dict) -> dict:
    """`options` as the types they must have: a command line gives '64' and 'no'."""
    converted = {}
    for name, value in options.items():
        kind, description = _TYPES.get(name, (Any, ""))
        try:
            converted[name] = None if value is None else TypeAdapter(kind).validate_python(value)
        except ValidationError:
            raise SettingsError(f"{name}={value!r} must be {description}.") from None
    return converted


def refuse_absent(device: str) -> None:
    """Raises SettingsError where this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise SettingsError(f"device={device!r} is not to be had here: "
                            f"{str(error).splitlines()[0]}") from None
