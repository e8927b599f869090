"""The explorer in a real browser: headless Chromium in JupyterLab and on the Voilà page. Screenshots are kept.

They go to $DLR_SCREENSHOTS, or to a folder of pytest's own that the test names.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest

from dlr.base.models import NANO_ROUTER
from dlr.explore.serve import HOST, free_port, server
from dlr.runs import project_root

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,1500",
         "--hide-scrollbars")
NONE = "Chromium is not installed, so no browser test runs: apt-get install chromium chromium-driver"
if not (CHROMIUM and DRIVER):
    warnings.warn(NONE, stacklevel=1)             # pytest shows it with -q as well, where reasons of skips are not shown
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=NONE),
              pytest.mark.skipif(not (NANO_ROUTER / "router_config.json").is_file(),
                                 reason="the embedded router (dlr/nano/router) is not there")]
STRIP, HEAT, TEXT = ".dlr-strip", ".dlr-heat", "textarea"


@pytest.fixture
def folder(tmp_path):
    chosen = Path(os.environ.get("DLR_SCREENSHOTS") or tmp_path / "screenshots")
    chosen.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {chosen}")
    return chosen


@contextlib.contextmanager
def browser(profile: Path, *flags: str):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """JupyterLab on a copy of the notebook whose first cells make the explorer; yields the notebook's address."""
    port = free_port()
    shutil.copy(project_root() / "notebooks" / "08_explorer.ipynb", folder / "08_explorer.ipynb")
    environment = os.environ | {"PYTHONPATH": str(project_root()), "DLR_RESULTS": str(folder / "results"),
                                "JUPYTER_CONFIG_DIR": str(folder / "config")}
    with (folder / "lab.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", f"--ServerApp.ip={HOST}", f"--ServerApp.port={port}", "--no-browser",
             "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        wait(lambda: urllib.request.urlopen(f"http://{HOST}:{port}/api", timeout=2), 90, "JupyterLab's answer")
        yield f"http://{HOST}:{port}/lab/tree/08_explorer.ipynb?reset"
    finally:
        process.terminate()
        process.wait(20)


def wait(condition, seconds: float = 120, what: str = "the view"):
    end = time.time() + seconds
    while time.time() < end:
        try:
            found = condition()
            if found:
                return found
        except Exception:               # the page or server is still changing
            pass
        time.sleep(0.3)
    raise TimeoutError(f"waited {seconds:.0f} s for {what}")


def inner(driver, selector: str) -> str:
    return driver.execute_script("const e = document.querySelector(arguments[0]); return e ? e.innerHTML : ''", selector)


def said(driver) -> str:
    """The text of the strip, without numbers and cards."""
    return driver.execute_script("return [...document.querySelectorAll('.dlr-strip .dlr-t')].map("
                                 "t => (t.previousSibling && t.previousSibling.nodeType == 3 ? ' ' : '') + "
                                 "t.firstChild.textContent).join('')")


def shot(driver, folder: Path, name: str) -> None:
    driver.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 20_000, "an empty picture"


def use_the_explorer(driver, folder: Path, name: str) -> None:
    """Types a text, moves the slider, looks at a token, exports; each must change the page."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    wait(lambda: inner(driver, STRIP) and inner(driver, HEAT))
    wait(lambda: "…" not in inner(driver, ".dlr-tiles"), what="the times")
    shot(driver, folder, f"{name}-1-first-view")
    area = driver.find_element(By.CSS_SELECTOR, TEXT)
    before = inner(driver, STRIP), inner(driver, HEAT)
    area.click()
    area.send_keys(Keys.CONTROL, "a")
    area.send_keys("A zebra <script>alert(1)</script> met &lt;three&gt; axolotls at 7 o'clock in the rain.")
    wait(lambda: "zebra" in said(driver) and "&lt;three&gt;" in said(driver) and inner(driver, HEAT) != before[1],
         what="the new text")
    wait(lambda: "…" not in inner(driver, ".dlr-tiles"), what="its times")
    shot(driver, folder, f"{name}-2-typed")
    assert not driver.execute_script("return document.querySelectorAll('.dlr script').length")
    before = inner(driver, STRIP), inner(driver, HEAT), inner(driver, ".dlr-tiles")
    handle = driver.find_element(By.CSS_SELECTOR, ".widget-slider .noUi-handle")
    handle.send_keys(*[Keys.ARROW_RIGHT] * 20)
    wait(lambda: all(inner(driver, s) != b for s, b in zip((STRIP, HEAT, ".dlr-tiles"), before)), what="the new budget")
    wait(lambda: "…" not in inner(driver, ".dlr-tiles"), what="its losses")
    shot(driver, folder, f"{name}-3-budget")
    token = driver.find_elements(By.CSS_SELECTOR, ".dlr-t")[4]
    ActionChains(driver).move_to_element(token).perform()
    card = token.find_element(By.CSS_SELECTOR, ".dlr-card")
    wait(card.is_displayed, 10, "the card")
    assert "routed predicts" in card.text
    shot(driver, folder, f"{name}-4-hover")
    driver.find_element(By.XPATH, "//button[contains(., 'Export')]").click()
    links = wait(lambda: driver.find_elements(By.CSS_SELECTOR, "a[download]"), what="the exported files")
    assert len(links) == 5
    saved = driver.execute_script("return atob(document.querySelector('a[download=\"tokens.html\"]').href.split(',')[1])")
    page = saved.encode("latin-1").decode("utf-8")
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    live = driver.execute_script("return document.querySelector('.dlr-strip').textContent")
    shot(driver, folder, f"{name}-5-exported")
    driver.get((folder / f"{name}.html").resolve().as_uri())
    assert driver.execute_script("return document.querySelector('.dlr-strip').textContent") == live
    shot(driver, folder, f"{name}-6-exported-page")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                           {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    shot(driver, folder, f"{name}-7-exported-page-dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def open_tab(driver, label: str) -> None:
    from selenium.webdriver.common.by import By
    driver.find_element(By.XPATH, f"//li[contains(@class, 'TabBar-tab')][contains(., '{label}')]").click()


def test_the_explorer_on_the_voila_page(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_RESULTS", str(tmp_path / "results"))
    from selenium.webdriver.common.by import By
    with server() as address, browser(tmp_path / "profile") as driver:
        driver.get(address)
        use_the_explorer(driver, folder, "voila")
        driver.get(address)
        wait(lambda: inner(driver, STRIP))
        outside = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [u for u in outside if not u.startswith((address.split("?")[0], "data:", "blob:"))] == []
        open_tab(driver, "Compare")
        wait(lambda: inner(driver, ".dlr-sums"), what="the comparison")
        shot(driver, folder, "voila-8-compare")
        open_tab(driver, "Generate")
        button = wait(lambda: driver.find_element(By.XPATH, "//button[contains(., 'Generate')]"))
        wait(button.is_displayed)
        button.click()
        wait(lambda: "generating…" in driver.page_source, what="the first token")
        driver.find_element(By.XPATH, "//button[contains(., 'Stop')]").click()
        wait(lambda: ">stopped<" in driver.page_source, what="the end")
        shot(driver, folder, "voila-9-generate")


def test_the_explorer_in_jupyterlab(folder, tmp_path):
    with jupyterlab(tmp_path) as address, browser(tmp_path / "profile") as driver:
        driver.get(address)
        wait(lambda: driver.execute_script("return document.querySelectorAll('.jp-Notebook .jp-CodeCell').length > 3"),
             what="the notebook")
        wait(lambda: driver.execute_script(
            "return !!document.querySelector('[data-status=\"idle\"], .jp-Notebook-ExecutionIndicator[data-status=idle]')"),
            what="the kernel")
        from selenium.webdriver.common.by import By
        driver.find_element(By.XPATH, "//div[contains(@class,'lm-MenuBar-itemLabel')][text()='Run']").click()
        wait(lambda: driver.find_element(By.CSS_SELECTOR, "li[data-command='runmenu:run-all']")).click()
        wait(lambda: driver.find_elements(By.CSS_SELECTOR, TEXT) and inner(driver, STRIP), what="the explorer")
        driver.execute_script("document.querySelector('textarea').scrollIntoView()")
        use_the_explorer(driver, folder, "lab")
