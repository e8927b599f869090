"""Checkpoints: PEFT's own files for LoRA, plus router.safetensors and router_config.json. No pickle.

    model = dlr.from_pretrained("results/token_routing/default-s0/checkpoint")
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dlr.config import RouterConfig, RunConfig, validated
from dlr.models import load_base
from dlr.routed import NANO_NAME, Routing, attach, causal_lm, describe_base, routing_of
from dlr.router import ROUTER_NAME

WEIGHTS, CONFIG = "router.safetensors", "router_config.json"


class WrongBase(ValueError):
    """A checkpoint was made for another base model."""


def fingerprint(model) -> str:
    """Eight hex digits of the base model's vectors (norms, biases), the same in float32 and bfloat16, with LoRA or not."""
    digest = hashlib.sha256()
    vectors = {name.replace(".base_layer", ""): p for name, p in causal_lm(model).named_parameters()
               if p.ndim == 1 and ROUTER_NAME not in name and "lora_" not in name}
    for _, parameter in sorted(vectors.items()):
        digest.update(parameter.detach().float().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:8] if vectors else ""


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A temporary folder that becomes `folder` only when the block ends without an error."""
    import shutil
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_router(routing: Routing, folder: Path) -> None:
    """The router's two files, into an existing folder."""
    save_file(routing.router.weights(), folder / WEIGHTS)
    base = describe_base(routing.model) | {"fingerprint": fingerprint(routing.model)}
    record = routing.config.model_copy(update={"base": base}).model_dump()
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_pretrained(model, folder: str | Path) -> Path:
    """Saves router and LoRA of a routed model; the folder appears whole or not at all."""
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        if hasattr(model, "peft_config"):
            model.save_pretrained(temporary, safe_serialization=True)
            (temporary / "README.md").unlink(missing_ok=True)       # PEFT's empty model card template
            adapter = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
            adapter["base_model_name_or_path"] = describe_base(model)["name"]
            (temporary / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
        write_router(routing_of(model), temporary)
    return folder


def _refuse_other_base(stored: dict, model, folder: Path) -> None:
    own = describe_base(model) | {"fingerprint": fingerprint(model)}
    compared = ["model_type", "layers", "width", "vocabulary"]
    if next(causal_lm(model).parameters()).dtype != torch.float16:        # float16 rounds the norms differently
        compared.append("fingerprint")
    differing = [key for key in compared if stored.get(key) and own[key] and stored[key] != own[key]]
    if differing:
        def say(base):
            return f"{base['name'] or base['model_type']} ({', '.join(f'{k} {base[k]}' for k in differing)})"
        raise WrongBase(f"The checkpoint {str(folder)!r} was made for {say(stored)} and cannot be loaded onto "
                        f"{say(own)}; load it onto the model it was made for.")


def from_pretrained(folder: str | Path, model=None):
    """A routed model from `folder`, onto `model` or onto the base model the checkpoint names.

    Raises:
        FileNotFoundError: no router files in `folder`; WrongBase: `model` is not what the router was made for.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no DLR checkpoint: it needs {CONFIG} and {WEIGHTS}.")
    config = validated(json.loads((folder / CONFIG).read_text(encoding="utf-8")), RouterConfig)
    if model is None:
        name = config.base.get("name", "")
        model, _ = load_base(RunConfig(model="nano" if name in ("", NANO_NAME) else name))
    _refuse_other_base(config.base, model, folder)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    routing = attach(model, config)
    routing.config.base = config.base
    routing.router.load_weights(load_file(folder / WEIGHTS))
    return model.eval()
