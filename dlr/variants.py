"""Models as a benchmark sees them: a checkpoint's weights under one source of gates.

Every plan here depends on a token's own document and position alone, so batch size, order and padding change nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dlr.baselines import static_pair
from dlr.checkpoint import CONFIG, atomic_folder, fingerprint, from_pretrained
from dlr.checkpoint import refuse_other_base as _refuse_other_base
from dlr.config import RouterConfig, RunConfig, SettingsError, validated
from dlr.discovery import CONTROL, find_checkpoint, from_project
from dlr.models import load_base
from dlr.policy import Policy, RouterPolicy
from dlr.routed import NANO_NAME, Routing, attach, describe_base
from dlr.runs import METRICS

VARIANTS = ("routed", "static", "stochastic", "dense", "base")


def draw(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


class StaticByDocument(Policy):
    """Two neighbouring static plans `[U]`; each document draws one of them, so that their mean meets the budget.

    `keys` names the document of each row of the batch. Both sentences of a minimal pair run under the same plan.
    """

    def __init__(self, fewer: torch.Tensor, more: torch.Tensor, share_more: float):
        self.plans, self.share_more, self.keys = torch.stack([fewer, more]).float(), share_more, []

    def __call__(self, routing, hidden, current):
        chosen = torch.tensor([int(draw(key) < self.share_more) for key in self.keys])
        return self.plans[chosen].to(hidden.device).unsqueeze(1).expand(-1, hidden.shape[1], -1), None


class RandomByDocument(Policy):
    """Stochastic depth at evaluation: every token drops every unit with probability `skip`, drawn from its document's
    name and its place in the row."""

    def __init__(self, skip: float):
        self.skip, self._keys, self._uniform = skip, [], None

    @property
    def keys(self) -> list[str]:
        return self._keys

    @keys.setter
    def keys(self, names: list[str]) -> None:
        self._keys, self._uniform = names, None

    def __call__(self, routing, hidden, current):
        place = current.position.clamp(min=0).cpu()
        longest = int(place.max()) + 1
        if self._uniform is None or self._uniform.shape[1] < longest:
            length = 64 * -(-longest // 64)
            self._uniform = torch.stack([torch.rand(length, routing.units, generator=torch.Generator().manual_seed(
                int(draw(key) * 2**53))) for key in self._keys])
        gates = (self._uniform[torch.arange(len(place)).unsqueeze(1), place] >= self.skip).float()
        return gates.to(hidden.device), None


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
    digest: str = ""                    # of weights and plan: results of another one are not taken for this one's

    def at_skip(self, skip: float, forced: float = 0.0) -> None:
        """Moves a static plan along its order to `skip`, where a share `forced` of the tokens runs everything anyway."""
        most = 1 - forced
        fewer, more, share = static_pair(self.order, self.routing.units, min(skip, most), forced)
        self.policy.plans, self.policy.share_more = torch.stack([fewer, more]).float(), share


def save_control(model, routing: Routing, folder: str | Path, variant: str, order: list[int] | None = None,
                 skip: float | None = None, forced: float = 0.0) -> Path:
    """Saves a control's LoRA and plan: `variant` is static (with its greedy `order`, `skip` and forced share),
    stochastic or dense. `open_variant` loads it. The folder appears whole or not at all."""
    record = {"variant": variant, "base": describe_base(model) | {"fingerprint": fingerprint(model)},
              "router": routing.config.model_dump(), "order": order, "skip": skip, "forced": forced}
    with atomic_folder(Path(folder)) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").unlink(missing_ok=True)
        path = temporary / "adapter_config.json"
        adapter = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": record["base"]["name"]}
        path.write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
        (temporary / CONTROL).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _base(name: str, **loading):
    return load_base(RunConfig(model="nano" if name in ("", NANO_NAME) else name, bf16=False, **loading))


def stored_order(path: Path) -> tuple[list[int], float | None]:
    """The greedy static order in a run's metrics.json, and the router's measured skip there."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    order = next((row["order"] for row in rows if row.get("order")), None)
    if order is None:
        raise SettingsError(f"{str(path)!r} holds no static order: no row has an 'order'. Run the phase with its 'best "
                            "static' control, or give another run's metrics.json with --order.")
    return order, next((row["skip"] for row in rows if row["variant"].startswith("DLR")), None)


def _order_near(checkpoint: Path, given: str | None) -> tuple[list[int], float | None]:
    if given:
        path = from_project(given)
        return stored_order(path / METRICS if path.is_dir() else path)
    for folder in list(checkpoint.resolve().parents)[:3]:
        if (folder / METRICS).is_file():
            return stored_order(folder / METRICS)
    raise SettingsError(f"The run of {str(checkpoint)!r} has no {METRICS} with a greedy static order; name one with "
                        "--order RUN.")


def _weights_digest(net) -> str:
    """Of a base model: its fingerprint and a little of every matrix, since a hash of all of an 8B model takes minutes."""
    digest = hashlib.sha256(fingerprint(net).encode())
    for _, parameter in sorted(net.named_parameters()):
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _file_digest(folder: Path, *more) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def open_variant(checkpoint: str, variant: str | None = None, skip: float | None = None, order: str | None = None,
                 model: str | None = None, say=print, **loading) -> Loaded:
    """Loads `checkpoint` (see `dlr.discovery.find_checkpoint`; or a base model) under `variant`.

    Args:
        variant: routed (its router), static (its weights under the greedy static plan), stochastic (tokens drop units
            at random), dense (its weights at full depth), base. By default what the checkpoint is.
        skip: for static and stochastic; by default the router's measured skip, or what the control was trained at.
        order: run folder or metrics.json that holds the greedy static order; by default the checkpoint's own run.
        model: base model to load the checkpoint onto; by default the one it names.
        loading: dtype, attn_implementation, load_in_4bit of the base model, as in `config.RunConfig`.

    Raises:
        FileNotFoundError, SettingsError, WrongBase.
    """
    if variant is not None and variant not in VARIANTS:
        raise SettingsError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}.")
    if skip is not None and not 0 <= skip <= 1:
        raise SettingsError(f"skip={skip} must lie between 0 and 1.")
    if _is_base(checkpoint, variant):
        if variant not in (None, "base", "dense"):
            raise SettingsError(f"{checkpoint!r} is a base model without a router; variant={variant!r} needs a checkpoint.")
        net, tokenizer = _base(NANO_NAME if checkpoint == "nano" else checkpoint, **loading)
        return Loaded("base", "base", net, tokenizer, None, None, Path(checkpoint).name, digest=_weights_digest(net))
    folder = find_checkpoint(checkpoint, say)
    control = folder / CONTROL
    stored = json.loads((control if control.is_file() else folder / CONFIG).read_text(encoding="utf-8"))
    net, tokenizer = _base(model or stored.get("base", {}).get("name", ""), **loading)
    if control.is_file():
        loaded = _open_control(folder, stored, net, tokenizer, variant, skip)
    else:
        loaded = _open_router(folder, net, tokenizer, variant or "routed", skip, order)
    loaded.model.eval()
    loaded.checkpoint = "/".join(folder.parts[-4:]) if not folder.is_absolute() else "/".join(folder.parts[-3:])
    loaded.digest = _file_digest(folder, loaded.variant, loaded.order, skip)
    return loaded


def _is_base(checkpoint: str, variant: str | None) -> bool:
    folder = Path(checkpoint).expanduser()
    return checkpoint == "nano" or variant == "base" or (folder.is_dir() and (folder / "config.json").is_file()
                                                         and not (folder / CONFIG).exists())


def _open_router(folder: Path, net, tokenizer, variant: str, skip: float | None, order: str | None) -> Loaded:
    net = from_pretrained(folder, net)
    from dlr.routed import routing_of
    routing = routing_of(net)
    loaded = Loaded(variant, variant, net, tokenizer, routing, None)
    if variant == "routed":
        loaded.policy = RouterPolicy()
        if skip is not None:
            from dlr.calibration import threshold_at
            routing.config.threshold = threshold_at(routing.config.curve, skip)
    elif variant == "static":
        loaded.order, measured = _order_near(folder, order)
        skip = next((s for s in (skip, measured, routing.config.calibrated_skip) if s is not None), None)
        if skip is None:
            raise SettingsError("This router was never calibrated and its run gives no measured skip: give --skip.")
        loaded.policy = StaticByDocument(*static_pair(loaded.order, routing.units, skip))
    elif variant == "stochastic":
        loaded.policy = RandomByDocument(_needed(skip, routing.config.calibrated_skip))
    return loaded


def _needed(*skips: float | None) -> float:
    found = next((skip for skip in skips if skip is not None), None)
    if found is None:
        raise SettingsError("Give the share of layers to drop: --skip 0.4.")
    return found


def _open_control(folder: Path, stored: dict, net, tokenizer, variant: str | None, skip: float | None) -> Loaded:
    from peft import PeftModel
    _refuse_other_base(stored["base"], net, folder)
    net = PeftModel.from_pretrained(net, str(folder), is_trainable=False)
    variant = variant or stored["variant"]
    config = validated(stored["router"] | {"base": {}}, RouterConfig)
    loaded = Loaded(variant, variant, net, tokenizer, attach(net, config), None)
    if variant == "routed":
        raise SettingsError(f"{str(folder)!r} is a {stored['variant']} control and has no router.")
    if variant == "static":
        if stored["order"] is None:
            raise SettingsError(f"{str(folder)!r} is a {stored['variant']} control and has no static plan.")
        loaded.order = stored["order"]
        plans = static_pair(loaded.order, loaded.routing.units, stored["skip"] if skip is None else skip,
                            stored["forced"] if skip is None else 0.0)
        loaded.policy = StaticByDocument(*plans)
    elif variant == "stochastic" and skip:
        loaded.policy = RandomByDocument(skip)
    return loaded
