"""The report as files: report.html, report.pdf where a browser is at hand, and tables/*.tex.

Nothing in the page names a network: its style, its pictures and its equations (MathML) lie in it,
and its content security policy forbids it to fetch anything.
"""

import html
import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dlr.progress import tqdm
from dlr.runs import METRICS, project_root, results_folder, shown_path, write_atomically
from dlr.workbook.report import claims, predecessor, sections
from dlr.workbook.report.commands import command_of, making
from dlr.workbook.report.pictures import Picture, data_uri, is_tall, pictures, png, undrawn
from dlr.workbook.report.sources import Missing, Results
from dlr.workbook.report.tables import Table

HERE = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True,
                        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "microsoft-edge", "msedge")
PATIENCE = 180                       # seconds that a browser has to print
# Signs that mean something to LaTeX, and those it has other ones for.
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "−": "$-$", "±": r"$\pm$", "–": "--", "λ": r"$\lambda$", "“": "``", "”": "''"})


def _render(template: str, **values) -> Markup:
    return Markup(TEMPLATES.get_template(template).render(**values))


# -- a section ------------------------------------------------------------------------------------
def _missing(error: Missing) -> Markup:
    return _render("missing.html", run=error.run, what=str(error), command=making(error.run))


def _prose(results: Results, name: str) -> Markup:
    """The words of a section, which may read the results; empty where it has none."""
    names = {"setting": results.setting, "metric": results.metric, "percent": results.percent,
             "published": results.published, "made": results.made, "METRICS": METRICS,
             "works": json.loads((HERE / "citations.json").read_text(encoding="utf-8")),
             "facts": partial(predecessor.facts, results), "caveats": predecessor.CAVEATS,
             "seeds": partial(claims.seeded, results)}
    module = TEMPLATES.get_template("method.html" if name == "method" else "prose.html")
    macro = getattr(module.make_module(names), name, None)
    return Markup("") if macro is None else Markup(macro())


def _table(results: Results, table: Table) -> Markup:
    made = list(dict.fromkeys(command_of(results, run)[0] for run in table.runs))
    return _render("table.html", table=table, commands=made)


class _Parts:
    """What a report is put together from: its sections in HTML, tables and figures."""

    def __init__(self, results: Results):
        self.results = results
        self.tables: list[Table] = []
        self.figures: list[Picture] = []

    def protected(self, make) -> Markup:
        """What `make` gives, or the note that says which run is not there."""
        try:
            return make()
        except Missing as error:
            return _missing(error)

    def _table(self, make) -> Markup:
        table = make()
        self.tables.append(table)
        return _table(self.results, table)

    def _tables(self, section) -> list[Markup]:
        try:
            return [self.protected(partial(self._table, make))
                    for make in section.tables(self.results)]
        except Missing as error:
            return [_missing(error)]

    def _picture(self, picture) -> Markup:
        content = png(picture)
        if content is None:
            return Markup("")
        self.figures.append(picture)
        return _render("figure.html", picture=picture, address=data_uri(content),
                       is_tall=is_tall(content))

    def body(self, section) -> Markup:
        """A section: words, tables, what they say, figures."""
        results = self.results
        blocks = [self.protected(lambda: _prose(results, section.name))]
        if section.tables:
            blocks += self._tables(section)
        if section.name == "figures":
            blocks.append(self._table(lambda: sections.figures_table(self.figures)))
            blocks.append(_render("undrawn.html", figures=undrawn(results)))
        if section.name == "verdict":
            blocks.append(_render("verdict.html", lists=claims.judged(results)))
        blocks.append(_render("claims.html", claims=claims.claimed(results, section.name)))
        shown = [each for each in pictures(results, section.phase) if section.shows(each.name)] \
            if section.phase else []
        return Markup("\n").join([*blocks, *map(self._picture, shown)])


def page(results: Results, bar: bool = True) -> tuple[Markup, list[Table]]:
    """(the whole page, its tables) of a results folder; it says what is missing, and what makes it.
    """
    parts = _Parts(results)
    bodies = [(section, parts.body(section))
              for section in tqdm(sections.SECTIONS, desc="report", unit="section",
                                  disable=not bar)]
    whole = _render("report.html", sections=bodies, headlines=claims.headlines(results),
                    style=Markup(TEMPLATES.get_template("report.css").render()))
    return whole, parts.tables


# -- files ----------------------------------------------------------------------------------------
def _plain(cell) -> str:
    """A cell's text: markup without its elements."""
    text = cell.__html__() if hasattr(cell, "__html__") else html.escape(str(cell))
    return Markup(text).striptags()


def _escaped(cell) -> str:
    return _plain(cell).translate(LATEX)


def latex(table: Table) -> str:
    """A table in LaTeX, with the rules of booktabs; every text is escaped."""
    frame = pd.DataFrame([list(map(_escaped, row)) for row in table.rows],
                         columns=list(map(_escaped, table.columns)))
    return frame.style.hide(axis="index").to_latex(
        hrules=True, caption=_escaped(table.caption), label=f"tab:{table.name}",
        position_float="centering", column_format="l" * len(frame.columns))


def browser() -> str | None:
    """The program that can print the page, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def print_pdf(page_file: Path, pdf: Path, program: str) -> bool:
    """Prints a page; False where the browser does not manage to."""
    root = getattr(os, "geteuid", lambda: 1)() == 0             # has no sandbox to be put in
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        printed = Path(folder) / "report.pdf"
        command = [program, "--headless", *(["--no-sandbox"] if root else []), "--disable-gpu",
                   f"--user-data-dir={folder}/profile", "--no-pdf-header-footer",
                   f"--print-to-pdf={printed}", page_file.absolute().as_uri()]
        try:
            subprocess.run(command, capture_output=True, timeout=PATIENCE)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if not printed.is_file():
            return False
        write_atomically(pdf, printed.read_bytes())
    return True


def recorded_results() -> Path:
    """The results folder; the project's own where that holds no finished run."""
    folder = results_folder()
    return folder if any(folder.glob(f"*/*/{METRICS}")) else project_root() / "results"


def write_report(results: Path | None = None, out: Path | None = None, pdf: bool = True,
                 say=print, bar: bool = True) -> Path:
    """Writes the report of a results folder; returns the page's path.

    Args:
        results: default: `recorded_results()`. out: default: 'report' in the results folder.

    Raises:
        FileNotFoundError: `results` is no folder with a finished run.
    """
    root = Path(results) if results else recorded_results()
    if not any(root.glob(f"*/*/{METRICS}")):
        raise FileNotFoundError(f"{str(root)!r} holds no finished run (<phase>/<run>/{METRICS}); "
                                "give a results folder: python -m dlr report --results DIR")
    target = Path(out) if out else results_folder() / "report"
    whole, tables = page(Results(root), bar)
    path = write_atomically(target / "report.html", whole)
    say(shown_path(path))
    for table in tables:
        write_atomically(target / "tables" / f"{table.name}.tex", latex(table))
    say(f"{shown_path(target / 'tables')}: {len(tables)} tables for LaTeX (booktabs)")
    (target / "report.pdf").unlink(missing_ok=True)            # of other results, perhaps
    program = browser() if pdf else None
    if program and print_pdf(path, target / "report.pdf", program):
        say(shown_path(target / "report.pdf"))
    elif pdf:
        say("No report.pdf: no browser here prints it. Open report.html and print it.")
    return path
