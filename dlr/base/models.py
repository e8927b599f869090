"""Base models: embedded, a local folder or .gguf file, or from the Hub; LoRA through PEFT."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from dlr.base import gguf_file, smollm2
from dlr.routing.decoder import projections_of
from dlr.routing.packed import keep_differentiable
from dlr.routing.weights import NANO, NANO_NAME, REVISION
from dlr.runs import from_project

# PEFT 0.21 still asks transformers 5.23 for the old name of this property.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

NANO_ROUTER = NANO / "router"            # a trained, calibrated router for it
SMOLLM2_ROUTER = NANO.parent / "smollm2"            # the same for SmolLM2
DTYPES = ("float32", "bfloat16", "float16")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_compute_dtype": "bfloat16"}
# Repositories that hold a pickle only on their main branch, and a revision that has safetensors.
SAFETENSORS = {"openlm-research/open_llama_3b_v2": "refs/pr/12"}
# Else transformers has a web service convert such a repository, and loads what that makes of it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
_PICKLE = ("The weights of {} are there as a pickle only (pytorch_model.bin); loading one runs "
           "whatever code it holds, so it is refused. {} "
           "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder).")
_SAFE_COPY = "Ask for a safetensors copy, or convert it where you trust it:"
_SAFE_REVISION = "Its revision {0!r} has safetensors: set revision={0}. Or convert it yourself:"


def load_base(name: str = "nano", *, dtype: str | None = None,
              attn_implementation: str | None = None, load_in_4bit: bool | None = None,
              device: str | None = None, revision: str | None = None):
    """(model, tokenizer) of the base `name`; arguments and errors as in `open_model`."""
    model = open_model(name, dtype, attn_implementation, NF4 if load_in_4bit else None, device,
                       revision=revision)
    return model, AutoTokenizer.from_pretrained(source_of(name), revision=revision or "main")


def refuse_revision(name: str, revision: str | None) -> None:
    """Raises ValueError where `revision` is given and the model `name` has no revisions."""
    if revision and (name in ("nano", NANO_NAME, smollm2.NAME) or from_project(name).exists()):
        raise ValueError(f"revision={revision!r} names a version of a repository on the Hub, and "
                         f"model={name!r} is none; leave revision out.")


def source_of(name: str) -> str:
    """The folder or Hub id of a base model.

    'nano' and 'smollm2' go by name. The latter is downloaded, and a .gguf file converted, once.

    Raises:
        ConnectionError: SmolLM2 is not there and cannot be downloaded. ValueError: no model's file.
    """
    if name in ("nano", NANO_NAME):
        return str(NANO)
    if name == smollm2.NAME:
        return str(smollm2.folder())
    path = from_project(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(gguf_file.converted(path.resolve()))
    return str(path) if path.is_dir() else name


def attention_of(name: str | None, dtype: str) -> str:
    """The attention of transformers that `name` means; explicit names are taken as they are.

    'auto' is FlashAttention-2 where it is installed and can run (CUDA, weights in half precision),
    and otherwise 'sdpa', as None is.
    """
    if name != "auto":
        return name or "sdpa"
    half = dtype in ("bfloat16", "float16")
    flash = torch.cuda.is_available() and half and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def open_model(name: str, dtype: str | None = None, attn_implementation: str | None = None,
               quantisation: dict | None = None, device: str | None = None, upcast: bool = False,
               revision: str | None = None):
    """The base model `name`, in evaluation mode and without gradients.

    Args:
        name: 'nano' (the embedded model), 'smollm2' (see `dlr.base.smollm2`), a local folder or
            .gguf file, or a Hub id. A relative path is looked for from here, then from the
            project's root.
        dtype: of the weights; None is the base's own (of 'nano' and 'smollm2' float32).
        quantisation: bitsandbytes' settings, as `NF4`; None leaves the base as it is stored.
        attn_implementation: see `attention_of`.
        device: where the weights go; None is the CPU.
        upcast: float32 for what a 4-bit base does not pack, as earlier checkpoints have it: 0.6 GB
            more of a model of 3B parameters, 2 GB of one of 8B.
        revision: branch, tag, commit or 'refs/pr/N' of a Hub repository; None is its main branch.

    Raises:
        ConnectionError: neither a folder nor reachable; the message names the embedded model.
        ValueError: weights that are a pickle only, an unknown dtype, a revision of what has none.
    """
    _refuse_unknown(dtype)
    refuse_revision(name, revision)
    source = source_of(name)
    dtype = dtype or ("float32" if name in ("nano", NANO_NAME, smollm2.NAME) else "auto")
    options = {"dtype": getattr(torch, dtype, dtype),
               "attn_implementation": attention_of(attn_implementation, dtype),
               "use_safetensors": True, "revision": revision or "main",
               "adapter_kwargs": {"subfolder": "none"}}       # no adapter that lies beside the base
    if device:
        options["device_map"] = {"": device}
    if quantisation:
        ours = ("loaded_as", "quant_method")
        options["quantization_config"] = BitsAndBytesConfig(
            **{name: value for name, value in quantisation.items() if name not in ours})
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ValueError(_PICKLE.format(repr(source), _SAFE_COPY))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:          # a missing file or network each raise a class of their own
        if folder.exists():
            raise
        raise _not_loaded(name, revision, error) from error
    if quantisation and quantisation.get("load_in_4bit") and upcast:
        from peft import prepare_model_for_kbit_training  # takes seconds to import
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if revision:
        setattr(model, REVISION, revision)
    return keep_differentiable(model).eval().requires_grad_(False)


def _refuse_unknown(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")


def _not_loaded(name: str, revision: str | None, error: Exception) -> Exception:
    """What explains that a Hub repository could not be loaded."""
    if "safetensors" in str(error):
        safe = SAFETENSORS.get(name)
        remedy = _SAFE_COPY if safe in (None, revision) else _SAFE_REVISION.format(safe)
        return ValueError(_PICKLE.format(repr(name), remedy))
    at = f" at revision {revision!r}" if revision else ""
    return ConnectionError(f"The model {name!r}{at} is no local folder and could not be downloaded "
                           f"from the Hugging Face Hub ({type(error).__name__}). Without a "
                           "network use model='nano', the embedded base model.")


def add_lora(model, *, rank: int = 16, alpha: int = 32, dropout: float = 0.0, seed: int = 0,
             first: int = 0, targets: Sequence[str] = ()):
    """`model` with LoRA (Hu et al. 2021) on attention and MLP projections, drawn from `seed`.

    Args:
        first: layers before this one get none, so that their states stay those of the base.
        targets: names of the projections that get some; none named: all of them.

    Raises:
        ValueError: the model has no projection of such a name.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import
    known = projections_of(model)
    unknown = sorted(set(targets) - set(known))
    if unknown:
        raise ValueError(f"lora_targets names {', '.join(unknown)}, and the projections of this "
                         f"model are {', '.join(known)}.")
    torch.manual_seed(seed)
    layers = range(first, model.config.get_text_config().num_hidden_layers) if first else None
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=list(targets) or known,
        layers_to_transform=None if layers is None else list(layers)))
