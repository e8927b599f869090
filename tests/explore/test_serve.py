"""The explorer's server: who may reach it, what becomes of closed tabs, and what it refuses."""

import re
import socket
import time
import urllib.error
import urllib.request

import nbformat
import pytest

from dlr.__main__ import main
from dlr.base.models import NANO_ROUTER
from dlr.explore import serve
from dlr.runs import project_root

pytestmark = pytest.mark.skipif(not (NANO_ROUTER / "router_config.json").is_file(),
                                reason="the embedded router (dlr/nano/router) is not there")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


def answer(address: str, method: str = "GET") -> int:
    """The status of an answer to somebody without a cookie."""
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        return opener.open(urllib.request.Request(address, method=method), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_only_the_token_opens_the_page_and_kernels_of_closed_tabs_end(monkeypatch):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("'a page'")])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    monkeypatch.setattr(serve, "notebook", lambda *arguments, **loading: nbformat.writes(book))
    with serve.server(idle=8, check=1) as address:
        base, token = address.split("?token=")
        assert len(token) >= 32 and base.startswith("http://127.0.0.1:")
        kernel = "00000000-0000-0000-0000-000000000000"
        for path in ("", "?token=wrong", "explorer.ipynb", "voila/files/explorer.ipynb", "api/kernels",
                     f"api/kernels/{kernel}", f"api/kernels/{kernel}/channels"):
            assert answer(base + path) in (302, 403), path
        assert answer(f"{base}voila/api/shutdown/{kernel}", "POST") == 403
        assert answer(f"{base}voila/files/explorer.ipynb?token={token}") == 403, "no file of the server's folder"
        pages = [urllib.request.urlopen(address, timeout=120).read().decode() for _ in range(3)]
        assert all("a page" in page and "stderr" not in page for page in pages)
        kernels = {re.search(r'"kernelId": "([\w-]+)"', page)[1] for page in pages}
        assert len(kernels) == 3
        assert all(answer(f"{base}api/kernels/{one}") == 403 for one in kernels)
        end = time.time() + 90
        while time.time() < end and any(answer(f"{base}api/kernels/{one}?token={token}") == 200 for one in kernels):
            time.sleep(0.5)
        assert [answer(f"{base}api/kernels/{one}?token={token}") for one in kernels] == [404] * 3


def test_a_port_in_use_is_said(capsys):
    with socket.socket() as taken:
        taken.bind((serve.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["explore", "--serve", "--no-browser", "--port", str(port)]) == 2
    assert f"Port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_kernels_outlive_an_open_tab_only_and_the_token_is_on_no_command_line():
    options = " ".join(serve._options(serve.Path("x.ipynb"), 1, serve.IDLE, serve.CHECK))
    assert "cull_idle_timeout=60" in options and "cull_interval=15" in options and "cull_connected=False" in options
    assert "token=" not in options.replace("auto_token=True", "")


def test_the_page_s_notebook_names_the_checkpoint_by_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                                # a path of the project, given from elsewhere
    source = nbformat.reads(serve.notebook("dlr/nano/router", "a 'text'", dtype="bfloat16"), 4).cells[0].source
    folder = str(project_root() / "dlr" / "nano" / "router")
    assert source.endswith(f"""Workbench({folder!r}, "a 'text'", dtype='bfloat16')""")
    with pytest.raises(FileNotFoundError, match="There are: embedded router"):
        serve.notebook("nowhere")
    alone = nbformat.reads(serve.notebook(None, base="smollm2"), 4).cells[0].source
    assert alone.endswith("Workbench(None, None, base='smollm2')")
    placed = nbformat.reads(serve.notebook("nano-router", base="dlr/nano"), 4).cells[0].source
    assert placed.endswith(f"base={str(project_root() / 'dlr' / 'nano')!r})"), "its kernel starts elsewhere"


def test_the_browser_is_led_by_a_file_that_others_cannot_read(monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address))
    with serve._opened("http://127.0.0.1:1/?token=secret"):
        path = serve.Path(opened[0].removeprefix("file://"))
        assert "secret" in path.read_text(encoding="utf-8") and path.stat().st_mode & 0o077 == 0
    assert not path.exists() and "secret" not in opened[0]


def test_options_that_do_nothing_are_refused(capsys):
    for words in (["--serve", "--skip", "0.3"], ["a text", "--port", "8000"], ["a text", "--no-browser"]):
        assert main(["explore", *words]) == 2
    assert capsys.readouterr().err.count("--serve") == 3
