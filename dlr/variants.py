"""Models as a benchmark sees them: a checkpoint's weights under one source of gates.

Every plan here depends on a token's own document and position alone, so batch size, order and padding change nothing.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dlr.adapters import adapted, write_adapter
from dlr.baselines import static_pair
from dlr.calibration import threshold_at
from dlr.checkpoint import from_pretrained, load_onto, named_base, refuse_other_base, refuse_unsaveable, trains_biases
from dlr.router_config import RouterConfig
from dlr.settings import SettingsError, validated
from dlr.discovery import find_checkpoint
from dlr.encoding import tokenizer_of
from dlr.folder import (CONFIG, CONTROL, PARTS, RECORDS, as_json, atomic_folder, digests, looks_like,
                        refuse_incomplete)
from dlr.weights import NANO_NAME, base_record, identity
from dlr.models import load_base, open_model
from dlr.policy import Policy, RandomByDocument, RouterPolicy, StaticByDocument
from dlr.routed import Routing, routing_of
from dlr.runs import METRICS, from_project, slug, write_atomically

VARIANTS = ("routed", "static", "stochastic", "dense", "base")
LOADING = ("dtype", "load_in_4bit", "attn_implementation", "device")


@dataclass
class Loaded:
    """A model ready to be evaluated. `policy` None: full depth; `routing` None: no router is attached."""
    name: str
    variant: str
    model: torch.nn.Module
    tokenizer: object
    routing: Routing | None
    policy: Policy | None
    checkpoint: str = ""
    order: list[int] | None = None
    digest: str = ""                    # of weights, base and plan: results of another one are not taken for this one's
    base: dict = field(default_factory=dict)        # of the base model, as `identity.base_record` describes it

    def at_skip(self, skip: float, forced: float = 0.0) -> None:
        """Moves a static plan along its order to `skip`, where a share `forced` of the tokens runs everything anyway."""
        most = 1 - forced
        fewer, more, share = static_pair(self.order, self.routing.units, min(skip, most), forced)
        self.policy.plans, self.policy.share_more = torch.stack([fewer, more]).float(), share


def save_control(model, routing: Routing, folder: str | Path, variant: str, order: list[int] | None = None,
                 skip: float | None = None, forced: float = 0.0) -> Path:
    """Saves a control's adapter and plan: `variant` is static (with its greedy `order`, `skip` and forced share),
    stochastic (with the share `skip` it drops) or dense. `open_variant` loads it. Whole or not at all.

    Raises:
        NotSaveable: the model holds something trained that the files would not hold.
    """
    name = refuse_unsaveable(model, routing)
    record = {"variant": variant, "base": base_record(model), "router": routing.config.model_dump(), "order": order,
              "skip": skip, "forced": forced, "adapter": name}
    with atomic_folder(Path(folder)) as temporary:
        if name is not None:
            write_adapter(adapted(model, routing), name, temporary, record["base"]["name"])
        write_atomically(temporary / CONTROL, as_json(record | {"files": digests(temporary)}))
    return Path(folder)


def stored_order(path: Path, name: str | None = None) -> tuple[list[int], float | None]:
    """The greedy static order in a run's metrics.json, and the measured skip of its row `name` (None: of no row)."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    order = next((row["order"] for row in rows if row.get("order")), None)
    if order is None:
        raise SettingsError(f"{str(path)!r} holds no static order: no row has an 'order'. Run the phase with its 'best "
                            "static' control, or give another run's metrics.json with --order.")
    return order, next((row["skip"] for row in rows if name is not None and slug(row["variant"]) == slug(name)), None)


def _order_near(checkpoint: Path, given: str | None) -> tuple[list[int], float | None]:
    """The order of a run, and what this very checkpoint's row measured there; a row of another checkpoint is not taken."""
    if given:
        path = from_project(given)
        return stored_order(path / METRICS if path.is_dir() else path)
    places = list(checkpoint.resolve().parents)[:3]
    for place, folder in enumerate(places):
        if (folder / METRICS).is_file():
            named = (checkpoint.resolve(), *places)[place].name            # the folder below the run's
            return stored_order(folder / METRICS, _ROW_OF_FOLDER.get(named, named))
    raise SettingsError(f"The run of {str(checkpoint)!r} has no {METRICS} with a greedy static order; name one with "
                        "--order RUN.")


_ROW_OF_FOLDER = {"router": "DLR"}            # the frontier's runs call the folder of their one router so


def _file_digest(folder: Path, *more) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(folder.glob("*")):
        if path.name in (*PARTS, *RECORDS):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def open_variant(checkpoint: str, variant: str | None = None, skip: float | None = None, order: str | None = None,
                 model: str | None = None, say=print, **loading) -> Loaded:
    """Loads `checkpoint` (see `dlr.discovery.find_checkpoint`; or a base model) under `variant`.

    Args:
        variant: routed (its router), static (its weights under the greedy static plan), stochastic (tokens drop units
            at random), dense (its weights at full depth), base. By default what the checkpoint is.
        skip: for routed, the router's dial; for static and stochastic, by default the router's measured skip, or what the
            control was trained at.
        order: for static: run folder or metrics.json that holds the greedy order; by default the checkpoint's own run.
        model: base model to load the checkpoint onto; by default the one it names.
        loading: dtype, load_in_4bit, attn_implementation, device of the base model; by default as the checkpoint was
            trained. What a variant has no use for is refused.

    Raises:
        FileNotFoundError, SettingsError, WrongBase.
    """
    if not isinstance(checkpoint, str | Path) or not str(checkpoint).strip() or model == "":
        raise SettingsError(f"checkpoint={checkpoint!r}, model={model!r}: give a checkpoint's name, and a model's if any.")
    if variant is not None and variant not in VARIANTS:
        raise SettingsError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}.")
    if skip is not None and not 0 <= skip <= 1:
        raise SettingsError(f"skip={skip} must lie between 0 and 1.")
    unknown = sorted(set(loading) - set(LOADING))
    if unknown:
        raise SettingsError(f"{unknown[0]!r} is no way to load a base model; there are {', '.join(LOADING)}.")
    if _is_base(checkpoint, variant):
        return _open_base(checkpoint, variant, {"skip": skip, "order": order, "model": model}, loading)
    folder = find_checkpoint(checkpoint, say)
    record = refuse_incomplete(folder)
    control = (folder / CONTROL).is_file()
    kind = variant or (record["variant"] if control else "routed")
    _refuse_unused(kind, {"skip": skip, "order": order}, control)
    where = str(folder / (CONTROL if control else CONFIG))
    net = open_model(**named_base(record.get("base", {}), where, model and _source(model), **loading))
    tokenizer = tokenizer_of(net, folder)
    if control:
        loaded = _open_control(folder, record, net, tokenizer, kind, skip)
    else:
        loaded = _open_router(folder, net, tokenizer, kind, skip, order)
    loaded.model.eval()
    loaded.checkpoint = "/".join(folder.parts[-4:]) if not folder.is_absolute() else "/".join(folder.parts[-3:])
    loaded.base = base_record(loaded.model)
    loaded.digest = _file_digest(folder, loaded.variant, loaded.order, skip, identity(loaded.model))
    return loaded


def _source(name: str) -> str:
    return name if name in ("nano", NANO_NAME) else str(from_project(name)) if from_project(name).is_dir() else name


def _is_base(checkpoint: str, variant: str | None) -> bool:
    folder = from_project(checkpoint)
    return checkpoint == "nano" or variant == "base" or (folder.is_dir() and (folder / "config.json").is_file()
                                                         and not any((folder / name).exists() for name in RECORDS))


def _open_base(checkpoint: str, variant: str | None, given: dict, loading: dict) -> Loaded:
    if checkpoint == "nano-router" or looks_like(from_project(checkpoint)):
        raise SettingsError(f"{checkpoint!r} is a checkpoint; for variant='base' give its base model, or take variant='dense'.")
    if variant not in (None, "base", "dense"):
        raise SettingsError(f"{checkpoint!r} is a base model without a router; variant={variant!r} needs a checkpoint.")
    _refuse_unused("base", given, False)
    net, tokenizer = load_base(_source(checkpoint), **loading)
    return Loaded("base", "base", net, tokenizer, None, None, Path(checkpoint).name, digest=identity(net),
                  base=base_record(net))


def _refuse_unused(variant: str, given: dict, control: bool) -> None:
    """No argument is swallowed: what a variant has no use for is refused."""
    used = {"routed": {"skip"}, "static": {"skip"} if control else {"skip", "order"}, "stochastic": {"skip"}}
    idle = [name for name, value in given.items() if value is not None and name not in used.get(variant, ())]
    if idle:
        why = {"order": " (a static control holds its own)" if control and variant == "static" else "",
               "model": " (the model is what is opened)"}.get(idle[0], "")
        raise SettingsError(f"variant={variant!r} has no use for {' and '.join(idle)}{why}; leave it out.")


def _open_router(folder: Path, net, tokenizer, variant: str, skip: float | None, order: str | None) -> Loaded:
    net = from_pretrained(folder, net)
    routing = routing_of(net)
    loaded = Loaded(variant, variant, net, tokenizer, routing, None)
    if variant == "routed":
        loaded.policy = RouterPolicy()
        if skip is not None:
            routing.dialled = threshold_at(routing.config.curve, skip)
    elif variant == "static":
        loaded.order, measured = _order_near(folder, order)
        skip = _needed(skip, measured, routing.config.calibrated_skip)
        loaded.policy = StaticByDocument(*static_pair(loaded.order, routing.units, skip))
    elif variant == "stochastic":
        loaded.policy = RandomByDocument(_needed(skip, routing.config.calibrated_skip))
    return loaded


def _needed(*skips: float | None) -> float:
    known = next((skip for skip in skips if skip is not None), None)
    if known is None:
        raise SettingsError("Nothing tells what share of the layers to skip (the router was never calibrated, the control's "
                            "record holds none): give it, for example --skip 0.4.")
    return known


def _open_control(folder: Path, stored: dict, net, tokenizer, variant: str, skip: float | None) -> Loaded:
    if variant == "routed":
        raise SettingsError(f"{str(folder)!r} is a {stored['variant']} control and has no router.")
    if variant == "static" and stored["order"] is None:
        raise SettingsError(f"{str(folder)!r} is a {stored['variant']} control and has no static plan.")
    refuse_other_base(stored["base"], net, folder, trains_biases(folder, stored))
    net = load_onto(net, folder, stored, validated(stored["router"] | {"base": stored["base"]}, RouterConfig))
    loaded = Loaded(variant, variant, net, tokenizer, routing_of(net), None)
    own = stored["skip"] if stored["variant"] == variant else None
    if variant == "static":
        loaded.order = stored["order"]
        plans = static_pair(loaded.order, loaded.routing.units, _needed(skip, own), stored["forced"] if skip is None else 0.0)
        loaded.policy = StaticByDocument(*plans)
    elif variant == "stochastic":
        loaded.policy = RandomByDocument(_needed(skip, own))
    return loaded
