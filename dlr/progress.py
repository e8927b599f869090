"""Progress bars: widgets in JupyterLab, text in a terminal or under papermill (DLR_TERMINAL=1)."""

import os

from tqdm.auto import tqdm as _auto
from tqdm.std import tqdm as _std


def tqdm(*args, **options):
    """tqdm that leaves nothing behind when it ends."""
    bar = _std if os.environ.get("DLR_TERMINAL") else _auto
    options.setdefault("disable", os.environ.get("RANK", "0") != "0")     # one of several shows it
    return bar(*args, **{"leave": False, "mininterval": 1.0, "dynamic_ncols": True, **options})
