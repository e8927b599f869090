"""Saving checkpoints: PEFT's own adapter files, router.safetensors and router_config.json.

A checkpoint is what was trained: what its files would not hold is refused when it is saved. It
names the base model it was made for by weights, dtype and quantisation; `dlr.base.restore` brings
those back.
"""

from pathlib import Path

from transformers import AutoConfig

from dlr.base import smollm2
from dlr.base.adapters import (NotSaveable, active_adapter, adapted, refuse_unsaveable_adapter,
                               write_adapter)
from dlr.base.folder import (ADAPTER_CONFIG, CONFIG, CONTROL, WEIGHTS, as_json, atomic_folder,
                             digests)
from dlr.base.models import source_of
from dlr.routing.config import RouterRecord
from dlr.routing.decoder import routing_of
from dlr.routing.handle import Routing
from dlr.routing.router import ROUTER_NAME
from dlr.routing.weights import base_record, causal_lm, differences
from dlr.runs import save_tensors, write_atomically


def refuse_unsaveable(model, routing: Routing) -> str | None:
    """The name of the adapter of `model`, if any, once all of it can be held by a checkpoint.

    Raises:
        NotSaveable: adapters on the router, several active ones, trained base weights, or a base
            that was changed or merged since the router was attached.
    """
    fresh = type(routing.router)(1, routing.units, routing.config)
    expected = {name for name, _ in fresh.named_parameters()}
    if getattr(causal_lm(model), ROUTER_NAME, None) is not routing.router or \
            {name for name, _ in routing.router.named_parameters()} != expected:
        raise NotSaveable("An adapter took in the router, whose weights have files of their own; "
                          "leave 'dlr_router' out of the adapter's target_modules and "
                          "modules_to_save.")
    carrier = adapted(model, routing)
    name = None if carrier is None else refuse_unsaveable_adapter(carrier)
    base = base_record(model)
    changed, _ = differences(routing.base, base, _trains_biases(carrier))
    if changed:
        raise NotSaveable("The base model's own weights are no longer those the router was "
                          f"attached to ({', '.join(changed)}): an adapter was merged into them, "
                          "or they were trained. Save before merging (or unmerge_adapter()); or "
                          "save the changed model itself (model.save_pretrained), load it, and "
                          "attach a router to that.")
    _refuse_reshaped(base)
    return name


def _refuse_reshaped(base: dict) -> None:
    """Where the named base is at hand: a model that was resized has weights that no file holds."""
    if not base["name"]:
        return
    try:
        config = AutoConfig.from_pretrained(source_of(base["name"]), local_files_only=True,
                                            revision=base.get("revision", "main"))
    except (OSError, ValueError):
        return
    text = config.get_text_config()
    shape = {"layers": text.num_hidden_layers, "width": text.hidden_size,
             "vocabulary": text.vocab_size}
    changed = [f"{key} {base[key]} instead of {value}" for key, value in shape.items()
               if base[key] != value]
    if changed:
        raise NotSaveable(f"The base model is no longer {base['name']}: {', '.join(changed)}. A "
                          "checkpoint would name that one; save the changed model itself "
                          "(model.save_pretrained), load it, and attach a router to that.")


def _trains_biases(carrier) -> bool:
    configs = carrier.peft_config.values() if carrier is not None else ()
    return any(getattr(config, "bias", "none") != "none" for config in configs)


def write_router(routing: Routing, folder: Path, model=None, base: dict | None = None) -> None:
    """The router's two files, into an existing folder; the adapter's too where they are not there.

    The calibrated threshold is what is written, also within `dlr.budget`.

    Args:
        base: `base_record` of the model, where its weights cannot be read now.
    """
    model = routing.model if model is None else model
    carrier = adapted(model, routing)
    name = None if carrier is None else active_adapter(carrier)
    base = dict(base or base_record(model))
    if _trains_biases(carrier):       # the biases before they were trained are those of the base
        base["fingerprint"] = routing.base.get("fingerprint", "")
    if name is not None and not (folder / ADAPTER_CONFIG).exists():
        write_adapter(carrier, name, folder, base["name"])
    save_tensors(routing.router.weights(), folder / WEIGHTS)
    record = RouterRecord.of(routing.config, routing.calibration, base)
    record |= {"adapter": name, "files": digests(folder)}
    write_atomically(folder / CONFIG, as_json(record))
    _write_notice(folder, base)


def _write_notice(folder: Path, base: dict) -> None:
    """The notice that the licence of SmolLM2 asks of what is made on it."""
    if base["name"] == smollm2.NAME:
        write_atomically(folder / "NOTICE.md", smollm2.NOTICE)


def save_pretrained(model, folder: str | Path) -> Path:
    """Saves router and adapter of a routed model into `folder`, whole or not at all.

    Raises:
        NotSaveable: the model holds something trained that the files would not hold.
        ValueError: `folder` is empty.
    """
    if not str(folder).strip():
        raise ValueError("save_pretrained needs a folder's name; '' would be the working directory "
                         "itself.")
    routing = routing_of(model)
    refuse_unsaveable(model, routing)
    with atomic_folder(Path(folder)) as temporary:
        write_router(routing, temporary, model)
    return Path(folder)


def save_control(model, routing: Routing, folder: Path, variant: str,
                 order: list[int] | None = None, skip: float | None = None,
                 forced: float = 0.0) -> Path:
    """Saves a control's adapters and plan, whole or not at all; `dlr.load` opens it.

    Args:
        variant: static (with its greedy `order`, its `skip` and the share of `forced` tokens),
            stochastic (with the share `skip` that it drops), or dense.

    Raises:
        NotSaveable: the model holds something trained that the files would not hold.
    """
    name = refuse_unsaveable(model, routing)
    router = RouterRecord.of(routing.config, routing.calibration, routing.base)
    record = {"variant": variant, "base": base_record(model), "router": router, "order": order,
              "skip": skip, "forced": forced, "adapter": name}
    with atomic_folder(folder) as temporary:
        if name is not None:
            write_adapter(adapted(model, routing), name, temporary, record["base"]["name"])
        if routing.router.skip is not None:
            save_tensors(routing.router.adapters(), temporary / WEIGHTS)
        record["files"] = digests(temporary)
        write_atomically(temporary / CONTROL, as_json(record))
        _write_notice(temporary, record["base"])
    return folder
