"""A .gguf file is a base model: dequantised once, kept as safetensors, then loaded like any folder.

The folder's `source.json` names what it was made from, so that a checkpoint made on it names the
model and not a place in a cache.
"""

import hashlib
import json
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dlr.base.corpus import cache_folder
from dlr.base.folder import atomic_folder
from dlr.routing.weights import SOURCE
from dlr.runs import write_atomically


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, changed: int) -> str:
    """`sha256_of` a file, read once while it stays as it is: one opening asks several times."""
    return sha256_of(path)


def converted(path: Path) -> Path:
    """The folder of safetensors made from the file `path`, which is made where it is not there.

    Raises:
        ValueError: transformers cannot read the file; the message says why.
    """
    status = path.stat()
    digest = _digest(path, status.st_size, status.st_mtime_ns)
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:16]}"
    if not (folder / SOURCE).is_file():
        print(f"{path.name}: dequantised once, into {folder}", file=sys.stderr, flush=True)
        convert(path, folder, name=str(path), digest=digest)
    return folder


def convert(path: Path, folder: Path, *, name: str, digest: str, opening: str | None = None,
            context: int | None = None, notices: dict[str, bytes] | None = None) -> None:
    """Writes the model and tokenizer of a .gguf file to `folder`, in bfloat16, whole or not at all.

    Args:
        name: what checkpoints and tables call this model.
        opening: the token that opens a text, where it is another than the file says.
        context: the tokenizer's longest text, which the file does not hold.
        notices: further files of the folder, such as a licence.

    Raises:
        ValueError: transformers cannot read the file.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:            # the reader's own: a damaged file, an unknown family
        raise ValueError(f"{str(path)!r} could not be read as a model: {error}. Give a .gguf file "
                         "of a decoder that transformers knows, or a folder of safetensors."
                         ) from error
    _split_like(tokenizer, _splitting(path))
    if opening is not None:
        tokenizer.bos_token = opening
    if context is not None:
        tokenizer.model_max_length = context
    shutil.rmtree(folder, ignore_errors=True)         # half a folder, which somebody else left
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for notice, content in (notices or {}).items():
            write_atomically(temporary / notice, content)
        source = {"name": name, "file": path.name, "sha256": digest}
        write_atomically(temporary / SOURCE, json.dumps(source, indent=1) + "\n")


def _splitting(path: Path) -> str:
    """How the file's tokenizer cuts text before it looks up pieces, by the file's own name for it.
    """
    from gguf import GGUFReader  # slow to import, needed once a model
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return field.contents() if field is not None else ""


def _split_like(tokenizer, splitting: str) -> None:
    """transformers cuts every GPT-2-like vocabulary as GPT-2; SmolLM2's cuts off single digits."""
    if splitting == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
