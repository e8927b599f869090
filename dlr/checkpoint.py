"""Checkpoints: PEFT's own files for the adapter, plus router.safetensors and router_config.json. No pickle.

    model = dlr.from_pretrained("results/token_routing/default-s0/checkpoint")

A checkpoint is what was trained: what its files would not hold is refused when it is saved. It names the base model it
was made for by weights, dtype and quantisation, and loading restores those.
"""

import json
import sys
import warnings
from pathlib import Path

from safetensors.torch import load_file

from dlr.adapters import (NotSaveable, active_adapter, adapted, adapted_already, as_it_was, load_adapter,
                          refuse_unsaveable_adapter, write_adapter)
from dlr.router_config import RouterRecord
from dlr.settings import validated
from dlr.folder import (ADAPTER_CONFIG, CONFIG, CONTROL, WEIGHTS, as_json, atomic_folder, digests, has_adapter,
                        refuse_incomplete)
from dlr.weights import NANO_NAME, base_record, differences, fingerprint, said_of  # noqa: F401
from dlr.models import NF4, open_model, source_of
from dlr.router import ROUTER_NAME, router_class
from dlr.routed import Routing, attach, causal_lm, routing_of
from dlr.runs import from_project, save_tensors, write_atomically


class WrongBase(ValueError):
    """A checkpoint was made for another base model."""


# -- saving -------------------------------------------------------------------------------------------------------------
def refuse_unsaveable(model, routing: Routing) -> str | None:
    """Says, before a training is lost, what of `model` a checkpoint could not hold; returns its adapter's name, if any.

    Raises:
        NotSaveable: adapters on the router, several active ones, trained base weights, or a base that was changed or
            merged since the router was attached.
    """
    like = type(routing.router)(1, routing.units, routing.config)
    expected = {name for name, _ in like.named_parameters()}
    if getattr(causal_lm(model), ROUTER_NAME, None) is not routing.router or \
            {name for name, _ in routing.router.named_parameters()} != expected:
        raise NotSaveable("An adapter took in the router, whose weights have files of their own; leave 'dlr_router' "
                          "out of the adapter's target_modules and modules_to_save.")
    carrier = adapted(model, routing)
    name = None if carrier is None else refuse_unsaveable_adapter(carrier)
    base = base_record(model)
    changed, _ = differences(routing.base, base, _trains_biases(carrier))
    if changed:
        raise NotSaveable("The base model's own weights are no longer those the router was attached to "
                          f"({', '.join(changed)}): an adapter was merged into them, or they were trained. Save "
                          "before merging (or unmerge_adapter()); or save the changed model itself "
                          "(model.save_pretrained), load it, and attach a router to that.")
    _refuse_reshaped(base)
    return name


def _refuse_reshaped(base: dict) -> None:
    """Where the named base is at hand: a model that was resized since has weights that no file holds."""
    from transformers import AutoConfig
    if not base["name"]:
        return
    try:
        config = AutoConfig.from_pretrained(source_of(base["name"]), local_files_only=True).get_text_config()
    except (OSError, ValueError):
        return
    shape = {"layers": config.num_hidden_layers, "width": config.hidden_size, "vocabulary": config.vocab_size}
    changed = [f"{key} {base[key]} instead of {value}" for key, value in shape.items() if base[key] != value]
    if changed:
        raise NotSaveable(f"The base model is no longer {base['name']}: {', '.join(changed)}. A checkpoint would name "
                          "that one; save the changed model itself (model.save_pretrained), load it, and attach a "
                          "router to that.")


def _trains_biases(carrier) -> bool:
    configs = carrier.peft_config.values() if carrier is not None else ()
    return any(getattr(config, "bias", "none") != "none" for config in configs)


def write_router(routing: Routing, folder: Path, model=None) -> None:
    """The router's two files, into an existing folder; the adapter's too where they are not there yet.

    The calibrated threshold is what is written, also within `dlr.budget`.
    """
    model = routing.model if model is None else model
    carrier = adapted(model, routing)
    name = None if carrier is None else active_adapter(carrier)
    base = base_record(model)
    if _trains_biases(carrier):
        base["fingerprint"] = routing.base.get("fingerprint", "")      # of the biases before they were trained
    if name is not None and not (folder / ADAPTER_CONFIG).exists():
        write_adapter(carrier, name, folder, base["name"])
    save_tensors(routing.router.weights(), folder / WEIGHTS)
    settings = RouterRecord.of(routing.config, routing.calibration, base)
    write_atomically(folder / CONFIG, as_json(settings | {"adapter": name, "files": digests(folder)}))


def save_pretrained(model, folder: str | Path) -> Path:
    """Saves router and adapter of a routed model into `folder`, beside what else lies there; whole or not at all.

    Raises:
        NotSaveable: the model holds something trained that the files would not hold.
        ValueError: `folder` is empty.
    """
    if not str(folder).strip():
        raise ValueError("save_pretrained needs a folder's name; '' would be the working directory itself.")
    folder, routing = Path(folder), routing_of(model)
    refuse_unsaveable(model, routing)
    with atomic_folder(folder) as temporary:
        write_router(routing, temporary, model)
    return folder


def save_control(model, routing: Routing, folder: str | Path, variant: str, order: list[int] | None = None,
                 skip: float | None = None, forced: float = 0.0) -> Path:
    """Saves a control's adapter and plan: `variant` is static (with its greedy `order`, `skip` and forced share),
    stochastic (with the share `skip` it drops) or dense. `dlr.load` opens it. Whole or not at all.

    Raises:
        NotSaveable: the model holds something trained that the files would not hold.
    """
    name = refuse_unsaveable(model, routing)
    router = RouterRecord.of(routing.config, routing.calibration, routing.base)
    record = {"variant": variant, "base": base_record(model), "router": router, "order": order,
              "skip": skip, "forced": forced, "adapter": name}
    with atomic_folder(Path(folder)) as temporary:
        if name is not None:
            write_adapter(adapted(model, routing), name, temporary, record["base"]["name"])
        write_atomically(temporary / CONTROL, as_json(record | {"files": digests(temporary)}))
    return Path(folder)


# -- loading ------------------------------------------------------------------------------------------------------------
def read_config(record: dict) -> RouterRecord:
    """A checkpoint's record of its router."""
    if "variant" in record:                                  # a control's
        record = record["router"] | {"base": record["base"]}
    return validated({name: value for name, value in record.items() if name not in ("files", "adapter")}, RouterRecord)


def named_base(stored: dict, where: str, model: str | None = None, **loading) -> dict:
    """The arguments of `models.open_model` for the base a record names, at the dtype and quantisation recorded.

    Args:
        stored: the record's `base`; where: the file that says so; model: another name to load it from.
        loading: dtype, load_in_4bit, attn_implementation, device; None is what was recorded.

    Raises:
        WrongBase: the record names no base.
    """
    name = model or stored.get("name", "")
    if not name:
        raise WrongBase(f"{where} names no base model (it was built in memory); give the model: "
                        "from_pretrained(folder, model).")
    if model is None and name != NANO_NAME:
        print(f"base model: {name}, as {where} says", file=sys.stderr, flush=True)
    recorded, four = stored.get("quantisation") or {}, loading.get("load_in_4bit")
    quantisation = recorded if recorded.get("quant_method") == "bitsandbytes" else None
    if four is not None and bool(four) != bool(recorded.get("load_in_4bit")):
        quantisation = NF4 if four else None
    dtype = loading.get("dtype") or recorded.get("loaded_as") or stored.get("dtype")
    return {"name": name, "dtype": dtype, "quantisation": quantisation, "device": loading.get("device"),
            "attn_implementation": loading.get("attn_implementation"),
            "upcast": quantisation is not recorded or stored.get("dtype") == "float32"}


def refuse_other_base(stored: dict, model, folder: Path, biases: bool = False) -> None:
    """Compares the base a checkpoint was made for with `model`; what differs in precision alone is warned of.

    Raises:
        WrongBase: the weights are those of another model.
    """
    own = base_record(model)
    other, precision = differences(stored, own, biases)
    if other:
        def say(base):
            told = [key for key in other if key in base]
            return f"{base.get('name') or base.get('model_type')}" + \
                (f" ({', '.join(f'{key} {base[key]}' for key in told)})" if told else "")
        parts = [part for part in other if part not in stored]
        raise WrongBase(f"The checkpoint {str(folder)!r} was made for {say(stored)} and cannot be loaded onto "
                        f"{say(own)}{': the weights differ (fingerprint of ' + ', '.join(parts) + ')' if parts else ''}; "
                        "load it onto the model it was made for.")
    if [key for key in precision if key != "fingerprint"]:
        def precise(base):
            return f"{base.get('dtype')}, {said_of(base.get('quantisation'))}"
        warnings.warn(f"The checkpoint {str(folder)!r} was made on a base in {precise(stored)}; this one is "
                      f"{precise(own)}. Its router, threshold and adapter were fitted to the other: gates and scores "
                      "will differ. Give no dtype and no load_in_4bit to load the base as it was.", stacklevel=4)
    if "fingerprint" in precision:
        warnings.warn(f"The weights under the checkpoint {str(folder)!r} could not be compared with those it was made "
                      "for, only their shapes: its record is of an earlier form, or one of the two is in float16. "
                      "Save it again to have them compared.", stacklevel=4)


def trains_biases(folder: Path, record: dict) -> bool:
    """Whether the adapter in `folder` brings biases for the base."""
    return has_adapter(folder, record) and \
        json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("bias", "none") != "none"


def from_pretrained(folder: str | Path, model=None, *, is_trainable: bool = False, dtype: str | None = None,
                    load_in_4bit: bool | None = None, attn_implementation: str | None = None,
                    device: str | None = None):
    """A routed model from `folder`, onto `model` or onto the base model the checkpoint names, in evaluation mode.

    Args:
        folder: the checkpoint's own folder; `dlr.load` also takes names, runs and phases, and gives the tokenizer too.
        model: the base model, or its name; a load that fails leaves it as it was.
        is_trainable: adapter and router can go on training; otherwise neither takes gradients.
        dtype, load_in_4bit, attn_implementation, device: how the base is loaded where no `model` is given; by default
            with the dtype and quantisation the checkpoint was trained at.

    Raises:
        FileNotFoundError: no checkpoint in `folder`, or half of one. WrongBase: `model` is not what it was made for.
        ValueError: weights that do not fit, pickles, or a model that carries adapters already.
    """
    folder = from_project(folder)
    record = refuse_incomplete(folder)
    if "variant" in record:
        raise FileNotFoundError(f"{str(folder)!r} is a {record['variant']} control and has no router; open it with dlr.load.")
    return restore(folder, record, model, is_trainable, dtype=dtype, load_in_4bit=load_in_4bit,
                   attn_implementation=attn_implementation, device=device)


def restore(folder: Path, record: dict, model=None, is_trainable: bool = False, **loading):
    """The model that a checkpoint's `record` describes, in evaluation mode; that of a control has a fresh router.

    Arguments and errors as in `from_pretrained`.
    """
    config, weights = read_config(record), None
    if "variant" not in record:
        weights = load_file(folder / WEIGHTS)
        router_class(config.router_class).refuse_unfit(weights, config)
    if model is None or isinstance(model, str):
        where = str(folder / (CONFIG if weights is not None else CONTROL))
        model = open_model(**named_base(config.base, where, model, **loading))
    elif given := [name for name, value in loading.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} says how to load a base model, but a model was given; load it so "
                         "yourself, or leave the model out.")
    refuse_other_base(config.base, model, folder, trains_biases(folder, record))
    with as_it_was(model):
        routed = load_onto(model, folder, record, config, is_trainable)
        routing = routing_of(routed)
        try:
            if weights is not None:
                routing.router.load_weights(weights)
        except BaseException:
            routing.detach()
            raise
        routing.router.requires_grad_(is_trainable)
    return routed.eval()


def load_onto(model, folder: Path, record: dict, config: RouterRecord, is_trainable: bool = False):
    """`model` with a checkpoint's adapter, where it has one, and a fresh router; the base was compared."""
    if has_adapter(folder, record):
        model = load_adapter(model, folder, is_trainable, record.get("adapter") or "default")
    elif adapted_already(model):
        raise ValueError(f"This {type(causal_lm(model)).__name__} carries adapters and the checkpoint {str(folder)!r} "
                         "has none; give the base model without them (model.unload()).")
    routing = attach(model, config.config)
    routing.calibration = config.calibration
    routing.base["name"] = config.base.get("name") or routing.base["name"]
    return model
