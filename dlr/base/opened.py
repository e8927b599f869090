"""The one way to open a model: a checkpoint under its own plan or another, or a base model.

    model, tokenizer, routing = dlr.load("nano-router")
    dense = dlr.load("results/token_routing/default", variant="dense").model

Every plan of a control depends on a token's own document and position alone, so that batch size,
order and padding change nothing.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dlr.base.adapters import as_it_was
from dlr.base.encoding import tokenizer_of
from dlr.base.find import find_checkpoint
from dlr.base.folder import RECORDS, digest_of, looks_like, refuse_incomplete
from dlr.base.models import load_base, source_of
from dlr.base.restore import restore
from dlr.routing.budget import threshold_at
from dlr.routing.by_document import RandomByDocument, StaticByDocument
from dlr.routing.decoder import routing_of
from dlr.routing.handle import Routing
from dlr.routing.plan import static_pair
from dlr.routing.policy import Policy, RouterPolicy
from dlr.routing.weights import base_record, identity
from dlr.runs import METRICS, from_project, slug
from dlr.settings import SettingsError

KINDS = ("routed", "static", "stochastic", "dense", "base")
# The frontier's runs call the folder of their one router so.
_ROW_OF_FOLDER = {"router": "DLR"}


@dataclass
class Opened:
    """A model that is ready to run; it unpacks to (model, tokenizer, routing).

    Attributes:
        routing: the router's handle; None for a base model.
        kind: what decides which layers run, one of KINDS.
        policy: the source of gates, which is also the one in force; None: full depth.
        name: what tables call this model; its kind unless another is given.
        checkpoint: the last parts of the path it came from.
        folder: the checkpoint's folder; None for a base model.
        order: the units in the order in which a static plan drops them.
        digest: of weights, base and plan: results of another one are not taken for this one's.
        base: the base model, as `weights.base_record` describes it.
    """
    model: nn.Module
    tokenizer: object
    routing: Routing | None = None
    kind: str = "base"
    policy: Policy | None = None
    name: str = ""
    checkpoint: str = ""
    folder: Path | None = None
    order: list[int] | None = None
    digest: str = ""
    base: dict = field(default_factory=dict)

    def __post_init__(self):
        self.name = self.name or self.kind

    def __iter__(self):
        return iter((self.model, self.tokenizer, self.routing))

    def at_skip(self, skip: float, forced: float = 0.0) -> None:
        """Moves a static plan to `skip`, where a share `forced` of tokens runs everything."""
        skip = min(skip, 1 - forced)
        fewer, more, share = static_pair(self.order, self.routing.units, skip, forced)
        self.policy.plans = torch.stack([fewer, more]).float()
        self.policy.share_more = share


def load(name: str | Path | None = "nano-router", *, variant: str | None = None,
         skip: float | None = None, order: str | None = None, model: str | nn.Module | None = None,
         dtype: str | None = None, attn_implementation: str | None = None,
         load_in_4bit: bool | None = None, device: str | None = None, revision: str | None = None,
         say=print) -> Opened:
    """Opens a checkpoint or a base model, in evaluation mode.

    Args:
        name: a checkpoint as in `dlr.base.find.find_checkpoint`; or a base model: 'nano', a folder,
            or, with variant='base', a Hub id.
        variant: routed (its router), static (its weights under the greedy static plan), stochastic
            (tokens drop units at random), dense (its weights at full depth), base. By default what
            the checkpoint is.
        skip: for routed, the router's dial; for static and stochastic, by default the router's
            measured skip, or what the control was trained at.
        order: for static: the run folder or metrics.json that holds the greedy order; by default
            a depth router's own book, or else the checkpoint's own run.
        model: the base or its name; by default the checkpoint's. A failed load does not change it.
        dtype, attn_implementation, load_in_4bit, device, revision: how the base is loaded; by
            default as the checkpoint was trained, on the CPU.
        say: is told which of several checkpoints was taken.

    Raises:
        FileNotFoundError: there is no such checkpoint, or half of one.
        WrongBase: `model` is not what it was made for.
        SettingsError: an argument that the variant has no use for.
        ConnectionError: a base model that could not be downloaded.
    """
    _refuse_wrong(name, variant, skip, model)
    loading = {"dtype": dtype, "attn_implementation": attn_implementation,
               "load_in_4bit": load_in_4bit, "device": device, "revision": revision}
    if variant == "base" or _is_base(name):
        _refuse_unused("base", {"skip": skip, "order": order, "model": model})
        return _load_base(name, variant, loading)
    folder = find_checkpoint(name, say)
    record = refuse_incomplete(folder)
    kind = variant or record.get("variant", "routed")
    _refuse_unfit(folder, record, kind, {"skip": skip, "order": order})
    given = isinstance(model, nn.Module)
    with as_it_was(model) if given else contextlib.nullcontext():
        net = restore(folder, record, model, **loading)
        try:
            return _opened(folder, record, kind, net, skip, order)
        except BaseException:
            routing_of(net).detach()
            raise


def _opened(folder: Path, record: dict, kind: str, net, skip: float | None,
            order: str | None) -> Opened:
    parts = folder.parts[-3:] if folder.is_absolute() else folder.parts[-4:]
    opened = Opened(net, tokenizer_of(net, folder), routing_of(net), kind, folder=folder,
                    checkpoint="/".join(parts), base=base_record(net))
    _put_under_plan(opened, record, skip, order)
    opened.digest = digest_of(folder, kind, opened.order, skip, identity(net))
    return opened


# -- base models ----------------------------------------------------------------------------------
def _is_base(name: str | Path | None) -> bool:
    """Whether `name` is a base model's folder; a Hub id is not guessed, it may be mistyped."""
    if name is None:
        return False
    folder = Path(source_of(str(name)))
    checkpoint = any((folder / record).exists() for record in RECORDS)
    return (folder / "config.json").is_file() and not checkpoint


def _load_base(name: str | Path, variant: str | None, loading: dict) -> Opened:
    if str(name) == "nano-router" or looks_like(from_project(name)):
        raise SettingsError(f"{str(name)!r} is a checkpoint; for variant='base' give its base "
                            "model, or take variant='dense'.")
    if variant not in (None, "base", "dense"):
        raise SettingsError(f"{str(name)!r} is a base model without a router; variant={variant!r} "
                            "needs a checkpoint.")
    net, tokenizer = load_base(str(name), **loading)
    return Opened(net, tokenizer, checkpoint=Path(name).name, digest=identity(net),
                  base=base_record(net))


# -- refusals -------------------------------------------------------------------------------------
def _refuse_wrong(name, variant: str | None, skip: float | None, model) -> None:
    if name is not None and not str(name).strip() or model == "":
        raise SettingsError(f"name={name!r}, model={model!r}: give a checkpoint's name, and a "
                            "model's if any.")
    if variant is not None and variant not in KINDS:
        raise SettingsError(f"variant={variant!r} is not one of {', '.join(KINDS)}.")
    if skip is not None and not 0 <= skip <= 1:
        raise SettingsError(f"skip={skip} must lie between 0 and 1.")


def _refuse_unused(kind: str, given: dict, control: bool = False) -> None:
    """No argument is swallowed: what a variant has no use for is refused."""
    used = {"routed": {"skip"}, "static": {"skip"} if control else {"skip", "order"},
            "stochastic": {"skip"}}
    idle = [name for name, value in given.items()
            if value is not None and name not in used.get(kind, ())]
    if idle:
        why = {"order": " (a static control holds its own)" if control and kind == "static" else "",
               "model": " (the model is what is opened)"}.get(idle[0], "")
        raise SettingsError(f"variant={kind!r} has no use for {' and '.join(idle)}{why}; leave it "
                            "out.")


def _refuse_unfit(folder: Path, record: dict, kind: str, given: dict) -> None:
    control = record.get("variant")
    _refuse_unused(kind, given, control is not None)
    if control and kind == "routed":
        raise SettingsError(f"{str(folder)!r} is a {control} control and has no router.")
    if control and kind == "static" and record["order"] is None:
        raise SettingsError(f"{str(folder)!r} is a {control} control and has no static plan.")


# -- plans ----------------------------------------------------------------------------------------
def _put_under_plan(opened: Opened, record: dict, skip: float | None, order: str | None) -> None:
    """Sets the policy that the kind of `opened` asks for, in force on its model."""
    routing, measured, forced = opened.routing, None, 0.0
    calibrated = None if "variant" in record else routing.calibration.skip
    if record.get("variant") == opened.kind:     # the plan that a control was trained for
        measured = record["skip"]
    if opened.kind == "routed":
        opened.policy = RouterPolicy()
        if skip is not None:
            routing.threshold = threshold_at(routing.calibration.curve, skip)
    elif opened.kind == "static":
        if "variant" in record:
            opened.order = record["order"]
            forced = record["forced"] if skip is None else 0.0
        elif order is None and hasattr(routing.router, "set_order"):
            opened.order = routing.router.order.tolist()
        else:
            opened.order, measured = _order_near(opened.folder, order)
        skip = _needed(skip, measured, calibrated)
        opened.policy = StaticByDocument(*static_pair(opened.order, routing.units, skip, forced))
    elif opened.kind == "stochastic":
        opened.policy = RandomByDocument(_needed(skip, measured, calibrated))
    routing.policy = opened.policy


def _needed(*skips: float | None) -> float:
    first = next((skip for skip in skips if skip is not None), None)
    if first is None:
        raise SettingsError("Nothing tells what share of the layers to skip (the router was never "
                            "calibrated, the control's record holds none): give it, for example "
                            "--skip 0.4.")
    return first


def _stored_order(path: Path, name: str | None = None) -> tuple[list[int], float | None]:
    """(the greedy static order in a metrics.json, the measured skip of its row `name`)."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    order = next((row["order"] for row in rows if row.get("order")), None)
    if order is None:
        raise SettingsError(f"{str(path)!r} holds no static order: no row has an 'order'. Run the "
                            "phase with its 'best static' control, or give another run's "
                            "metrics.json with --order.")
    skips = (row["skip"] for row in rows if name is not None and slug(row["variant"]) == slug(name))
    return order, next(skips, None)


def _order_near(checkpoint: Path, given: str | None) -> tuple[list[int], float | None]:
    """(the order of a run, the skip of this very checkpoint's row there, of no other's)."""
    if given:
        path = from_project(given)
        return _stored_order(path / METRICS if path.is_dir() else path)
    places = list(checkpoint.resolve().parents)[:3]
    for place, folder in enumerate(places):
        if (folder / METRICS).is_file():
            below = (checkpoint.resolve(), *places)[place].name     # the folder below the run's
            return _stored_order(folder / METRICS, _ROW_OF_FOLDER.get(below, below))
    raise SettingsError(f"The run of {str(checkpoint)!r} has no {METRICS} with a greedy static "
                        "order; name one with --order RUN.")
