"""The explorer without JupyterLab: in the terminal, or in a browser from a local Voilà server on the loopback address.

    python -m dlr explore "Any text."
    python -m dlr explore --serve
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"
EXAMPLES = """examples:
  python -m dlr explore "The cat sat on the mat."          the embedded router, in the terminal
  python -m dlr explore --skip 0.3 --out view < notes.txt   another budget; also HTML, PNG, PDF, CSV and JSON
  python -m dlr explore --serve                             the whole explorer in a browser, on this machine only
"""


# Voilà's own page without the style sheets it takes from a network.
TEMPLATE = """{%- extends 'voila/templates/lab/index.html.j2' -%}
{% import "spinner.macro.html.j2" as spinner %}
{%- block notebook_css -%}
{% if frontend == "voila" %}{{ resources.include_js("static/voila-style.js") }}{% endif %}
{{ spinner.css() }}<style>.jp-mod-noOutputs.jp-mod-noInput{display:none}</style>
{{ super.super() }}
{%- endblock notebook_css -%}
"""


def add_parser(commands, formatter) -> None:
    """The `explore` command's arguments."""
    explore = commands.add_parser("explore", help="see what every token of a text costs", epilog=EXAMPLES,
                                  formatter_class=formatter)
    explore.add_argument("text", nargs="?", help="the text (default: standard input)")
    explore.add_argument("--checkpoint", metavar="FOLDER", help="checkpoint (default: the embedded router)")
    explore.add_argument("--skip", type=float, metavar="RATIO", help="budget, 0 to 0.8 (default: the calibrated one)")
    explore.add_argument("--out", metavar="FOLDER", help="also write the view as HTML, PNG, PDF, CSV and JSON")
    explore.add_argument("--plain", action="store_true", help="numbers without colours")
    explore.add_argument("--serve", action="store_true", help="open the explorer in a browser")
    explore.add_argument("--port", type=int, default=0, metavar="N", help="with --serve: port (default: a free one)")
    explore.add_argument("--no-browser", action="store_true", help="with --serve: only print the address")


def explore(arguments) -> int:
    """Runs the command; returns its exit status."""
    if arguments.serve:
        if arguments.skip is not None or arguments.out or arguments.plain:
            raise ValueError("--serve takes --checkpoint, a text, --port and --no-browser; budget and export are in the page.")
        return serve(arguments.checkpoint, arguments.port, not arguments.no_browser, arguments.text)
    text = arguments.text
    if text is None:
        if sys.stdin.isatty():
            raise ValueError('give a text, for example: python -m dlr explore "The cat sat on the mat."')
        text = sys.stdin.read()
    from dlr import terminal, views
    from dlr.export import export
    from dlr.session import Session
    session = Session(arguments.checkpoint)
    threshold = None if arguments.skip is None else session.threshold(arguments.skip)
    record = session.read(text, threshold=threshold)
    cost = session.timed(record)
    print(terminal.view(record, cost, colour=not arguments.plain and terminal.wants_colour()))
    note = " ".join(filter(None, [session.note, session.cut(record)]))
    if note:
        print(f"\n{note}")
    if arguments.out:
        for path in export(record, views.view(record, cost, note=note), arguments.out, cost):
            print(path)
    return 0


def notebook(checkpoint: str | None, text: str | None = None) -> str:
    """The one-cell notebook behind the page, as JSON."""
    import nbformat
    if checkpoint and Path(checkpoint).exists():          # a folder, not a label: the server runs elsewhere
        checkpoint = str(Path(checkpoint).resolve())
    source = f"from dlr.explorer_tabs import Workbench\nWorkbench({checkpoint!r}, {text!r})"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.writes(book)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(checkpoint: str | None = None, port: int = 0, text: str | None = None):
    """A running Voilà server of the explorer; yields its address. It listens on 127.0.0.1 only.

    Raises:
        OSError: it did not start; the message holds the end of its log.
    """
    from dlr.runs import project_root
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="dlr-explore-") as folder:
        book, log = Path(folder) / "explorer.ipynb", Path(folder) / "log.txt"
        book.write_text(notebook(checkpoint, text), encoding="utf-8")
        template = Path(folder) / "share" / "voila" / "templates" / "dlr"
        template.mkdir(parents=True)
        (template / "index.html.j2").write_text(TEMPLATE, encoding="utf-8")
        (template / "conf.json").write_text('{"base_template": "lab"}', encoding="utf-8")
        paths = [str(project_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "voila", str(book), f"--port={port}", f"--Voila.ip={HOST}", "--no-browser",
                 "--Voila.open_browser=False", "--VoilaConfiguration.show_tracebacks=True",
                 "--VoilaExecutor.timeout=120", "--template=dlr"],
                stdout=out, stderr=subprocess.STDOUT, env=os.environ | {
                    "PYTHONPATH": os.pathsep.join(paths),
                    "JUPYTER_PATH": os.pathsep.join([f"{folder}/share", *filter(None, [os.environ.get("JUPYTER_PATH")])])})
        try:
            _await(process, f"http://{HOST}:{port}/voila/static/", log)
            yield f"http://{HOST}:{port}/"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


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
    raise OSError("The Voilà server did not start. Is voila installed (requirements.txt), and the port free? Its last "
                  f"words: {log.read_text(errors='replace')[-600:].strip()}")


def serve(checkpoint: str | None, port: int, browser: bool, text: str | None = None) -> int:
    """Serves until interrupted."""
    from dlr.session import folder_of
    folder_of(checkpoint)                 # a missing checkpoint is said here, not in the page
    with server(checkpoint, port, text) as address:
        print(f"The explorer is at {address} (this machine only). Ctrl-C ends it.", flush=True)
        if browser:
            import webbrowser
            webbrowser.open(address)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("\nstopped")
    return 0
