"""Which base model this is: a fingerprint of its weights, its precision and its quantisation.

Adapters and router are left out, so a base is the same with LoRA or without. Weights that
accelerate has offloaded are read where they lie. A merged or fine-tuned base is another one.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import nn

from dlr.routing.router import ROUTER_NAME

NANO = Path(__file__).parent.parent / "nano"
NANO_NAME = "dlr-nano"            # what files call the embedded model, wherever it lies
REVISION = "dlr_revision"         # attribute of a model that was loaded at a revision of its own
SOURCE = "source.json"            # in the folder of a converted model: what it was made from
SAMPLE = 64      # elements read of a layer's matrix; of other matrices one a row, of vectors all
PARTS = ("biases", "other tensors", "layer matrices")       # of the fingerprint, in this order


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, a compiled one (torch.compile), or both."""
    model = getattr(model, "_orig_mod", model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "_orig_mod", base)


def base_tensors(model: nn.Module):
    """(name without adapters' wrappers, tensor or None where it is nowhere) of base weights."""
    base = causal_lm(model)
    seen = set()
    tied = getattr(base, "all_tied_weights_keys", None) or {}

    def walk(module, prefix):
        if hasattr(module, "original_module"):        # PEFT's wrapper of a module trained whole
            yield from walk(module.original_module, prefix)
        elif hasattr(module, "adapter_layer_names"):  # PEFT's wrapper of a layer
            yield from walk(module.get_base_layer(), prefix)
        else:
            for name, tensor in module._parameters.items():
                again = tensor is not None and tensor.is_meta and prefix + name in tied
                if tensor is not None and not again and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield prefix + name, _where_it_lies(module, name, tensor)
            for name, child in module._modules.items():
                if child is not None and name != ROUTER_NAME:
                    yield from walk(child, f"{prefix}{name}.")

    yield from walk(base, "")


def _where_it_lies(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    if not tensor.is_meta:
        return tensor
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):    # accelerate: one hook, or several
        weights = getattr(part, "weights_map", None)
        if weights is not None:
            return weights[name]
    return None


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    values = tensor.detach()
    if hasattr(tensor, "quant_state"):
        values = values.view(torch.uint8)       # packed codes, whatever they are stored as
    width = values.shape[-1] if values.ndim else 1
    flat = values.reshape(-1)
    if values.ndim > 1 and _in_a_layer(name):
        flat = flat[::max(1, flat.numel() // SAMPLE) | 1][:SAMPLE]
    elif values.ndim > 1:
        flat = flat[::max(1, width - 1)]        # a step less than a row: meets every row
    if flat.dtype in (torch.uint8, torch.int8):
        return flat.cpu().numpy().tobytes()
    return flat.float().cpu().bfloat16().view(torch.int16).numpy().tobytes()


def _in_a_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", f".{name}") is not None


def fingerprint(model: nn.Module) -> str:
    """Three times eight hex digits: of biases, of other vectors and embeddings, of layer matrices.

    It is the same in float32 and bfloat16, with adapters or without, but packed matrices (4 bit)
    have another third part than unpacked ones. It is '' where weights are nowhere (on 'meta').
    """
    digests = [hashlib.sha256() for _ in PARTS]
    for name, tensor in sorted(base_tensors(model), key=lambda pair: pair[0]):
        if tensor is None:
            return ""
        part = 2 if tensor.ndim > 1 and _in_a_layer(name) else 0 if name.endswith("bias") else 1
        digests[part].update(name.encode() + b"\0" + _sample(name, tensor))
    return "-".join(digest.hexdigest()[:8] for digest in digests)


def quantisation_of(model: nn.Module) -> dict | None:
    """The quantisation of the base, as its library's own settings; None for plain weights."""
    config = causal_lm(model).config
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    public = {name: value for name, value in settings.items() if not name.startswith("_")}
    return public | {"loaded_as": str(getattr(config, "dtype", "")).removeprefix("torch.")}


def said_of(quantisation: dict | None) -> str:
    """A quantisation in a few words."""
    if not quantisation:
        return "not quantised"
    method = str(quantisation.get("quant_method", "")).removeprefix("QuantizationMethod.").lower()
    if quantisation.get("load_in_4bit"):
        return f"4 bit ({quantisation.get('bnb_4bit_quant_type')})"
    return "8 bit" if quantisation.get("load_in_8bit") else method or "quantised"


def dtype_of(model: nn.Module) -> str:
    """'float32', 'bfloat16' ...: of the base's unpacked weights."""
    plain = (tensor.dtype for _, tensor in base_tensors(model) if tensor is not None
             and tensor.is_floating_point() and not hasattr(tensor, "quant_state"))
    return str(next(plain, torch.float32)).removeprefix("torch.")


def describe_base(model: nn.Module) -> dict:
    """Name and shape of the base model, and the revision it was loaded at where one was named."""
    config = causal_lm(model).config.get_text_config()
    revision = getattr(causal_lm(model), REVISION, None)
    name = getattr(config, "_name_or_path", "") or ""
    return {"model_type": config.model_type, "name": _portable_name(name),
            "layers": config.num_hidden_layers, "width": config.hidden_size,
            "vocabulary": config.vocab_size} | ({"revision": revision} if revision else {})


def _portable_name(name: str) -> str:
    """The name of a base that holds on other machines: not the place where it is kept here."""
    if not name or not Path(name).is_dir():
        return name
    if Path(name).resolve() == NANO.resolve():
        return NANO_NAME
    source = Path(name) / SOURCE
    return json.loads(source.read_text(encoding="utf-8"))["name"] if source.is_file() else name


def base_record(model: nn.Module) -> dict:
    """What a checkpoint says about its base: `describe_base`, fingerprint, dtype, quantisation."""
    return describe_base(model) | {"fingerprint": fingerprint(model), "dtype": dtype_of(model),
                                   "quantisation": quantisation_of(model)}


def identity(model: nn.Module) -> str:
    """Sixteen hex digits of weights, dtype and quantisation: they tell one base from another."""
    record = base_record(model)
    for where in ("name", "revision"):
        record.pop(where, None)
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _loaded_as(record: dict) -> str:
    return (record.get("quantisation") or {}).get("loaded_as") or record.get("dtype", "")


def differences(stored: dict, now: dict,
                trained_biases: bool = False) -> tuple[list[str], list[str]]:
    """(what makes `now` another base than `stored`, what differs in precision alone), by name.

    Args:
        trained_biases: the adapter brings biases of its own, so the base's are not compared.

    Fields that one side does not know are not compared; nor are packed matrices with unpacked ones,
    nor weights rounded to float16 with others.
    """
    shape = [key for key in ("model_type", "layers", "width", "vocabulary")
             if stored.get(key) and now.get(key) and stored[key] != now[key]]
    precision = [key for key in ("dtype", "quantisation")
                 if key in stored and stored[key] != now.get(key)]
    before, after = (str(base.get("fingerprint") or "").split("-") for base in (stored, now))
    if len(before) != len(PARTS) or len(after) != len(PARTS):
        return shape, precision + ["fingerprint"]
    incomparable = {"biases"} if trained_biases else set()
    if (stored.get("quantisation") or {}) != (now.get("quantisation") or {}):
        incomparable.add("layer matrices")
    other = [part for part, old, new in zip(PARTS, before, after)
             if old != new and part not in incomparable]
    if precision and "float16" in (_loaded_as(stored), _loaded_as(now)):
        return shape, precision + (["fingerprint"] if other else [])
    return shape + other, precision
