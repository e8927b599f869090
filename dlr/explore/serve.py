"""The explorer without JupyterLab: in the terminal, or in a browser from a local Voilà server.

    python -m dlr explore "Any text."
    python -m dlr explore --serve

The page, its kernels and their websockets answer only who brings the token of the printed address
(or the cookie it is exchanged for), since other users of a machine reach its loopback address too.
Voilà's own scripts and style sheets, which hold nothing of the text, are served to anybody. A
kernel holds a model: that of a closed tab ends within IDLE + CHECK seconds.

What takes seconds to import (torch and all that needs it) is imported where it is used, since every
command reads this file.
"""

import argparse
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path

from markupsafe import Markup

HOST = "127.0.0.1"
IDLE, CHECK = 60, 15              # seconds without a tab after which a kernel ends; between looks
TOKEN_VARIABLE = "JUPYTER_TOKEN"  # in the environment: a command line can be read by other users
EXAMPLES = """examples:
  python -m dlr explore "The cat sat on the mat."          the embedded router, in the terminal
  python -m dlr explore --skip 0.3 --out view < notes.txt  another budget; also files for a paper
  python -m dlr explore --base smollm2 "Any text."          a base model, with its router if any
  python -m dlr explore --serve                            all of it in a browser, on this machine
"""
DATA = Path(__file__).parent / "templates"        # holds one for Voilà too
LOADING = ("base", "dtype", "load_in_4bit", "attn_implementation", "device")
REDIRECT = '<!doctype html><meta http-equiv=refresh content="0; url={}">'


def add_parser(commands, formatter) -> None:
    """The `explore` command's arguments."""
    explore = commands.add_parser("explore", help="see what every token of a text costs",
                                  epilog=EXAMPLES, formatter_class=formatter)
    add = explore.add_argument
    add("text", nargs="?", help="the text (default: standard input)")
    add("--checkpoint", metavar="FOLDER", help="checkpoint (default: the embedded router)")
    add("--base", metavar="MODEL", help="base model: smollm2, nano, a folder, a Hub id; with the "
        "router made for it, if any, or with --checkpoint's")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the base model's weights (default: as the checkpoint records)")
    add("--load-in-4bit", action=argparse.BooleanOptionalAction,
        help="NF4 weights of the base model (default: as the checkpoint records)")
    add("--attn-implementation", metavar="NAME",
        help="sdpa, eager, flash_attention_2, or auto (default sdpa)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: an accelerator if any)")
    add("--skip", type=float, metavar="RATIO",
        help="budget, 0 to 0.8 (default: the calibrated one)")
    add("--out", metavar="FOLDER", help="also write the view as HTML, PNG, PDF, CSV and JSON")
    add("--plain", action="store_true", help="numbers without colours")
    add("--serve", action="store_true", help="open the explorer in a browser")
    add("--port", type=int, default=0, metavar="N", help="with --serve: port (default: a free one)")
    add("--no-browser", action="store_true", help="with --serve: only print the address")


def explore(arguments) -> int:
    """Runs the command; returns its exit status."""
    loading = {name: getattr(arguments, name) for name in LOADING
               if getattr(arguments, name) is not None}
    if arguments.serve:
        if arguments.skip is not None or arguments.out or arguments.plain:
            raise ValueError("--serve takes --checkpoint, --base and how it is loaded, a text, "
                             "--port and --no-browser; budget and export are in the page.")
        return serve(arguments.checkpoint, arguments.port, not arguments.no_browser,
                     arguments.text, **loading)
    if arguments.port or arguments.no_browser:
        raise ValueError("--port and --no-browser belong to --serve.")
    if arguments.text is None and sys.stdin.isatty():
        raise ValueError('give a text, for example: '
                         'python -m dlr explore "The cat sat on the mat."')
    show(sys.stdin.read() if arguments.text is None else arguments.text, arguments, loading)
    return 0


def show(text: str, arguments, loading: dict) -> None:
    """Prints the view of a text, and writes it to files where asked."""
    from dlr.explore import export
    from dlr.explore import html as views
    from dlr.explore import terminal
    from dlr.explore.session import Session
    session = Session(arguments.checkpoint, **loading)
    threshold = None if arguments.skip is None else session.threshold(arguments.skip)
    longest = views.LONGEST if arguments.out else None
    record = session.read(text, threshold=threshold, longest=longest)
    cost = session.timed(record)
    colour = not arguments.plain and terminal.wants_colour()
    print(terminal.view(record, cost, colour=colour))
    note = " ".join(filter(None, [session.note, session.cut(record)]))
    if note:
        print(f"\n{note}")
    if arguments.out:
        view = views.view(record, cost, note=note)
        print(*export.export(record, view, arguments.out, cost), sep="\n")


def notebook(checkpoint: str | None, text: str | None = None, **loading) -> str:
    """The page's one-cell notebook, as JSON; its kernel needs a checkpoint named by its folder."""
    import nbformat

    from dlr.base.find import find_checkpoint
    from dlr.runs import from_project
    alone = checkpoint is None and "base" in loading
    folder = None if alone else str(find_checkpoint(checkpoint).resolve())
    if "base" in loading and (place := from_project(loading["base"])).exists():
        loading["base"] = str(place.resolve())
    settings = "".join(f", {name}={value!r}" for name, value in loading.items())
    source = f"from dlr.explore.tabs import Workbench\nWorkbench({folder!r}, {text!r}{settings})"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python",
                                   "name": "python3"}
    return nbformat.writes(book)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _options(book: Path, port: int, idle: float, check: float) -> list[str]:
    """Voilà's command line."""
    kernels = "--MappingKernelManager"
    return [sys.executable, "-m", "voila", str(book), f"--port={port}", f"--Voila.ip={HOST}",
            "--no-browser", "--Voila.open_browser=False", "--Voila.port_retries=0",
            "--Voila.auto_token=True", "--VoilaConfiguration.show_tracebacks=True",
            "--VoilaConfiguration.file_denylist=.*", "--VoilaExecutor.timeout=120",
            "--template=dlr", f"{kernels}.cull_idle_timeout={idle}",
            f"{kernels}.cull_interval={check}", f"{kernels}.cull_connected=False"]


def _environment(token: str) -> dict[str, str]:
    """The server's environment: this project's code, results and cache, its template, the token."""
    from dlr.base.corpus import cache_folder
    from dlr.runs import project_root, results_folder

    def before(name: str, path: Path) -> str:
        return os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))

    return os.environ | {
        TOKEN_VARIABLE: token, "DLR_RESULTS": str(results_folder().resolve()),
        "DLR_CACHE": str(cache_folder().resolve()),
        "PYTHONPATH": before("PYTHONPATH", project_root()),
        "JUPYTER_PATH": before("JUPYTER_PATH", DATA)}


@contextlib.contextmanager
def server(checkpoint: str | None = None, port: int = 0, text: str | None = None, *,
           idle: int = IDLE, check: int = CHECK, **loading):
    """A Voilà server of the explorer on 127.0.0.1 only; yields its address, token included.

    Args:
        idle, check: seconds without a tab after which a kernel ends, and seconds between looks.
        loading: base, dtype and device of the checkpoint, see `dlr.explore.session.Session`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        OSError: the port is taken, or the server did not start; the message ends with its log.
    """
    if port and _taken(port):
        raise OSError(f"Port {port} of {HOST} is in use; give another one with --port, or leave it "
                      "out for a free one.")
    port, token = port or free_port(), secrets.token_hex(24)
    with tempfile.TemporaryDirectory(prefix="dlr-explore-") as folder:
        book, log = Path(folder) / "explorer.ipynb", Path(folder) / "log.txt"
        book.write_text(notebook(checkpoint, text, **loading), encoding="utf-8")
        with log.open("w") as out:
            process = subprocess.Popen(_options(book, port, idle, check), stdout=out,
                                       stderr=subprocess.STDOUT, env=_environment(token))
        try:
            _await(process, f"http://{HOST}:{port}/voila/static/", log)
            yield f"http://{HOST}:{port}/?token={token}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(process, address: str, log: Path, seconds: float = 90) -> None:
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except urllib.error.HTTPError:           # it answers, if only to say no
            return
        except OSError:
            time.sleep(0.2)
    raise OSError("The Voilà server did not start. Is voila installed (requirements.txt), and the "
                  f"port free? Its last words: {log.read_text(errors='replace')[-600:].strip()}")


def serve(checkpoint: str | None, port: int, browser: bool, text: str | None = None,
          **loading) -> int:
    """Serves until interrupted."""
    try:
        with server(checkpoint, port, text, **loading) as address:
            print(f"The explorer is at {address} (this machine and this token only). Ctrl-C ends "
                  "it.", flush=True)
            with _opened(address) if browser else contextlib.nullcontext():
                while True:
                    time.sleep(3600)
    except KeyboardInterrupt:
        print("\nstopped")
    return 0


@contextlib.contextmanager
def _opened(address: str):
    """Opens a browser by a private file: others could read a command line with the token."""
    handle, name = tempfile.mkstemp(suffix=".html", prefix="dlr-explore-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(Markup(REDIRECT).format(address))
        webbrowser.open(Path(name).as_uri())
        yield
    finally:
        Path(name).unlink(missing_ok=True)
