"""Colours of the explorer's views.

One cividis ramp (Nuñez et al. 2018, made for colour-blind readers) with black or white text by
contrast on every step; cut at its dark end where the page is dark. Depth is always given as a
number as well.
"""

from matplotlib import colormaps
from matplotlib.colors import to_hex
from seaborn.utils import relative_luminance

LEVELS = 21                     # steps of the ramp, few layers to many
DARK_START = 0.26               # where the ramp begins on a dark page


def ramp(dark: bool = False) -> list[str]:
    """LEVELS colours as hexadecimal numbers, few layers to many."""
    start = DARK_START if dark else 0.0
    return [to_hex(colormaps["cividis"](start + (1 - start) * i / (LEVELS - 1)))
            for i in range(LEVELS)]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
    low, high = sorted((relative_luminance(first), relative_luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever reads better on `background`."""
    return max("#000000", "#ffffff", key=lambda colour: contrast(colour, background))
