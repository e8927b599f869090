"""The figures of the report, drawn from results alone, as data that lies inside the page."""

import base64
import io
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import matplotlib.pyplot as plt

from dlr.figures.register import ORIGINALS, registered
from dlr.workbook.report.sources import Results

# What the figures of the first studies show, in the register's order of their names.
SHOWN = ("validation loss by step", "last validation loss", "training loss by step",
         "last training loss", "tokens a second by layers", "active layers by λ, two models",
         "loss by active layers", "layers and loss by λ", "loss by λ",
         "parts of the loss, sequence router", "temperature and layers, sequence router",
         "validation loss of five methods", "parts of the loss, token router",
         "temperature and layers, token router", "accuracy by variant and task",
         "perplexity by variant", "accuracy by active layers")


class Registered(NamedTuple):
    """What the report knows of a registered figure.

    Attributes:
        phase: the first whose runs it reads. files: file name to the arguments of `draw`; none
            where its data is missing. command: makes its data. replaces: the figures of the first
            studies that it stands for.
    """
    phase: str
    draw: Callable
    files: dict[str, tuple]
    command: str
    replaces: tuple[str, ...]


@lru_cache(maxsize=4)
def figures_of(results: Results) -> list[Registered]:
    """Every registered figure. Nothing else in the report reads the register of figures."""
    return [Registered(entry.phases[0], entry.draw, entry.files_of(results.root), entry.command,
                       entry.replaces) for entry in registered().values()]


class Picture(NamedTuple):
    """A figure that can be drawn: its name, what it shows, what draws it, what it stands for."""
    name: str
    caption: str
    draw: Callable
    replaces: tuple[str, ...] = ()


def _caption(draw: Callable) -> str:
    return " ".join((draw.__doc__ or draw.__name__).split("\n\n")[0].split())


def pictures(results: Results, phase: str) -> list[Picture]:
    """The registered figures of a phase that these results can draw."""
    return [Picture(name, _caption(figure.draw), partial(figure.draw, *own), figure.replaces)
            for figure in figures_of(results) if figure.phase == phase
            for name, own in figure.files.items()]


def undrawn(results: Results) -> list[tuple[str, str]]:
    """(what it would show, command that makes its data) of each figure that is not drawn."""
    return [(_caption(figure.draw), figure.command) for figure in figures_of(results)
            if not figure.files]


def replaced(drawn: list[Picture]) -> list[tuple[str, str, list[str]]]:
    """(figure of the first studies, what it shows, the names of ours), for each of theirs."""
    return [(file, shows, [picture.name for picture in drawn if file in picture.replaces])
            for file, shows in zip(ORIGINALS, SHOWN, strict=True)]


def png(picture: Picture) -> bytes | None:
    """A figure as a PNG file; None where there is nothing to draw."""
    drawn = picture.draw()
    if drawn is None:
        return None
    file = io.BytesIO()
    drawn.savefig(file, format="png", bbox_inches="tight", dpi=160)
    plt.close(drawn)
    return file.getvalue()


def is_tall(content: bytes) -> bool:
    """Whether a PNG file is so much higher than it is wide that it takes a page of its own."""
    width, height = (int.from_bytes(content[at:at + 4]) for at in (16, 20))
    return height > 1.25 * width


def data_uri(content: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
