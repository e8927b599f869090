"""Figure of single tokens: which layers each of a passage runs, from a run's saved record."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from dlr.figures.analysis import SIGNS, record_of, shipped
from dlr.figures.style import DOUBLE, drawn, unit_names
from dlr.measure.record import Record

TAKEN = {"is skipped": "#E3DFC8", "runs": "#2F4B7C"}


def passage(record: Record, length: int) -> slice:
    """The `length` tokens of one document whose depths differ most; the first where several do."""
    depth = record.active_layers.double().numpy()
    document = record.document.numpy()
    best, start = -1.0, 0
    for first in range(0, max(1, len(depth) - length + 1), 8):
        window = slice(first, first + length)
        is_free = record.position[first] >= record.meta["keep_first_tokens"]
        if document[window][0] == document[window][-1] and is_free:
            spread = float(np.std(depth[window]))
            best, start = max((best, start), (spread, first), key=lambda pair: pair[0])
    return slice(start, start + length)


@shipped("token_map", lambda run: (record_of(run),))
@drawn
def token_map(record: Record, length: int = 48):
    """Which layers each token of a passage runs (dark) and skips, and how many it runs."""
    chosen = passage(record, length)
    gates = record.gates[chosen].numpy()
    keep, units = record.meta["always_keep"], record.meta["units_per_layer"]
    picture, (upper, lower) = plt.subplots(2, 1, figsize=(DOUBLE, 3.4), sharex=True,
                                           height_ratios=[1, 3])
    places = np.arange(len(gates))
    upper.bar(places, record.active_layers[chosen].numpy(), color=TAKEN["runs"], width=0.8)
    upper.set_ylabel("active\nlayers")
    lower.imshow(gates.T, aspect="auto", cmap=ListedColormap(TAKEN.values()), vmin=0, vmax=1,
                 origin="lower", interpolation="nearest")
    lower.set_yticks(range(gates.shape[1]), unit_names(gates.shape[1], keep, units))
    tokens = [token.translate(SIGNS) for token in record.tokens[chosen]]
    lower.set_xticks(places, tokens, rotation=90, fontsize=6.5)
    lower.set(ylabel="layer", xlabel="token read (\u00b7 is a space)")
    picture.legend(handles=[Patch(color=colour, label=label) for label, colour in TAKEN.items()],
                   loc="outside upper center", ncol=2)
    return picture
