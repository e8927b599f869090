"""A checkpoint's model, brought back onto the base model it was made for.

    model = dlr.from_pretrained("results/token_routing/router/router/checkpoint")

The base is compared by weights, and is loaded with the dtype and quantisation it was trained at.
`dlr.load` finds checkpoints by name and opens them with their tokenizer and plan.
"""

import json
import sys
import warnings
from pathlib import Path

from safetensors.torch import load_file

from dlr.base.adapters import adapted_already, as_it_was, load_adapter
from dlr.base.folder import ADAPTER_CONFIG, CONFIG, CONTROL, WEIGHTS, has_adapter, refuse_incomplete
from dlr.base.models import NF4, open_model
from dlr.routing.attach import attach
from dlr.routing.config import RouterRecord
from dlr.routing.router import router_class
from dlr.routing.weights import NANO_NAME, base_record, causal_lm, differences, said_of
from dlr.runs import from_project
from dlr.settings import validated


class WrongBase(ValueError):
    """A checkpoint was made for another base model."""


def from_pretrained(folder: str | Path, model=None, *, is_trainable: bool = False,
                    dtype: str | None = None, load_in_4bit: bool | None = None,
                    attn_implementation: str | None = None, device: str | None = None,
                    revision: str | None = None):
    """A routed model from `folder`, in evaluation mode.

    Args:
        folder: the checkpoint's own folder.
        model: the base model, or its name; by default the one that the checkpoint names. A load
            that fails leaves it as it was.
        is_trainable: adapter and router can go on training; otherwise neither takes gradients.
        dtype, load_in_4bit, attn_implementation, device, revision: how the base is loaded where no
            `model` is given; by default as the checkpoint's record says.

    Raises:
        FileNotFoundError: no checkpoint in `folder`, or half of one.
        WrongBase: `model` is not what it was made for.
        ValueError: weights that do not fit, pickles, or a model that carries adapters already.
    """
    folder = from_project(folder)
    record = refuse_incomplete(folder)
    if "variant" in record:
        raise FileNotFoundError(f"{str(folder)!r} is a {record['variant']} control and has no "
                                "router; open it with dlr.load.")
    return restore(folder, record, model, is_trainable, dtype=dtype, load_in_4bit=load_in_4bit,
                   attn_implementation=attn_implementation, device=device, revision=revision)


def restore(folder: Path, record: dict, model=None, is_trainable: bool = False, **loading):
    """`from_pretrained` for a checkpoint's `record`; a control's model gets a fresh router."""
    control = "variant" in record
    router = _router_record(record)
    weights = None
    if not control or router.skip_adapter_rank:
        weights = load_file(folder / WEIGHTS)
        router_class(router.router_class).refuse_unfit(weights, router, adapters_only=control)
    if model is None or isinstance(model, str | Path):
        where = str(folder / (CONTROL if control else CONFIG))
        model = open_model(**_named_base(router.base, where, model, **loading))
    elif given := [name for name, value in loading.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} says how to load a base model, but a model was "
                         "given; load it so yourself, or leave the model out.")
    _refuse_other_base(router.base, model, folder, _trains_biases(folder, record))
    with as_it_was(model):
        routed = _with_adapter(model, folder, record, is_trainable)
        routing = attach(routed, router.config)
        try:
            if weights is not None:
                routing.router.load_weights(weights, adapters_only=control)
        except BaseException:
            routing.detach()
            raise
        routing.calibration = router.calibration
        routing.base["name"] = router.base.get("name") or routing.base["name"]
        routing.router.requires_grad_(is_trainable)
    return routed.eval()


def _router_record(record: dict) -> RouterRecord:
    if "variant" in record:                                  # a control's
        record = record["router"] | {"base": record["base"]}
    settings = {name: value for name, value in record.items() if name not in ("files", "adapter")}
    return validated(settings, RouterRecord)


def _named_base(stored: dict, where: str, model: str | None = None, **loading) -> dict:
    """The arguments of `models.open_model` for the base a record names, as it was recorded.

    Args:
        stored: the record's `base`; where: the file that says so; model: another name for it.
        loading: dtype, load_in_4bit, attn_implementation, device, revision; None is what was
            recorded.

    Raises:
        WrongBase: the record names no base.
    """
    name = model or stored.get("name", "")
    if not name:
        raise WrongBase(f"{where} names no base model (it was built in memory); give the model: "
                        "from_pretrained(folder, model).")
    if model is None and name != NANO_NAME:
        print(f"base model: {name}, as {where} says", file=sys.stderr, flush=True)
    recorded = stored.get("quantisation") or {}
    in_4bit = loading.get("load_in_4bit")
    quantisation = recorded if recorded.get("quant_method") == "bitsandbytes" else None
    if in_4bit is not None and bool(in_4bit) != bool(recorded.get("load_in_4bit")):
        quantisation = NF4 if in_4bit else None
    revision = stored.get("revision") if name == stored.get("name") else None
    dtype = loading.get("dtype") or recorded.get("loaded_as") or stored.get("dtype")
    return {"name": name, "dtype": dtype, "quantisation": quantisation,
            "device": loading.get("device"), "revision": loading.get("revision") or revision,
            "attn_implementation": loading.get("attn_implementation"),
            "upcast": quantisation is recorded and stored.get("dtype") == "float32"}


def _refuse_other_base(stored: dict, model, folder: Path, biases: bool = False) -> None:
    """Compares the base a checkpoint was made for with `model`; warns where precision differs.

    Raises:
        WrongBase: the weights are those of another model.
    """
    present = base_record(model)
    other, precision = differences(stored, present, biases)
    if other:
        def described(base):
            told = ", ".join(f"{key} {base[key]}" for key in other if key in base)
            return f"{base.get('name') or base.get('model_type')}{f' ({told})' if told else ''}"
        parts = ", ".join(part for part in other if part not in stored)
        weights = f": the weights differ (fingerprint of {parts})" if parts else ""
        raise WrongBase(f"The checkpoint {str(folder)!r} was made for {described(stored)} and "
                        f"cannot be loaded onto {described(present)}{weights}; load it onto the "
                        "model it was made for.")
    if set(precision) - {"fingerprint"}:
        before, now = (f"{base.get('dtype')}, {said_of(base.get('quantisation'))}"
                       for base in (stored, present))
        warnings.warn(f"The checkpoint {str(folder)!r} was made on a base in {before}; this one is "
                      f"{now}. Its router, threshold and adapter were fitted to the other: gates "
                      "and scores will differ. Give no dtype and no load_in_4bit to load the base "
                      "as it was.", stacklevel=4)
    if "fingerprint" in precision:
        warnings.warn(f"The weights under the checkpoint {str(folder)!r} could not be compared "
                      "with those it was made for, only their shapes: its record is of an earlier "
                      "form, or one of the two is in float16. Save it again to have them compared.",
                      stacklevel=4)


def _trains_biases(folder: Path, record: dict) -> bool:
    """Whether the adapter in `folder` brings biases for the base."""
    if not has_adapter(folder, record):
        return False
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return settings.get("bias", "none") != "none"


def _with_adapter(model, folder: Path, record: dict, is_trainable: bool):
    """`model` with a checkpoint's adapter, where it has one."""
    if has_adapter(folder, record):
        return load_adapter(model, folder, is_trainable, record.get("adapter") or "default")
    if adapted_already(model):
        raise ValueError(f"This {type(causal_lm(model)).__name__} carries adapters and the "
                         f"checkpoint {str(folder)!r} has none; give the base model without them "
                         "(model.unload()).")
    return model
