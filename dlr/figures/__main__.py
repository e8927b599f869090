"""Draws every figure of figures/ from results/ alone (metrics.json and records), as PNG and PDF.

    python -m dlr.figures                                     # figures/
    python -m dlr.figures results/token_analysis/nano         # one run's figures, in its folder
"""

import sys
from pathlib import Path

from dlr.figures.register import redraw

if __name__ == "__main__":
    for path in redraw(*map(Path, sys.argv[1:2])):
        print(path)
