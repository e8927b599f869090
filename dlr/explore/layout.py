"""Where everything of a record stands in a drawing: layers, depths, shades, lines, numbers.

Web page, terminal and picture each draw one `Layout`; nothing here is HTML. Notation: n tokens,
L layers, l of them shown.
"""

import math
from dataclasses import dataclass

import torch

from dlr.explore.style import LEVELS
from dlr.explore.tokens import Shown, Words
from dlr.measure.record import Record

ROW_COLUMNS = 112              # fixed-width characters a line of tokens holds on a page
MOST_STEPS = 17                # numbers in a legend


@dataclass(frozen=True)
class Cost:
    """What one text costs: FLOPs, and median milliseconds (None where they are not measured)."""
    flops_dense: float
    flops_routed: float
    ms_dense: float | None = None
    ms_routed: float | None = None
    ms_unmerged: float | None = None         # routed, with LoRA's products apart from the weights
    execution: str = "masked"

    @property
    def ratio(self) -> float:
        """FLOPs of the plan, those of the dense model being 1."""
        return self.flops_routed / self.flops_dense


@dataclass(frozen=True)
class Look:
    """How a record is shown: layers `first` to `last`; `fit`: shades span the text's depths."""
    first: int = 0
    last: int | None = None
    fit: bool = True

    def layers(self, layers: int) -> range:
        """Those shown of `layers` layers, one at least."""
        last = layers - 1 if self.last is None else min(self.last, layers - 1)
        return range(min(self.first, last), last + 1)


def grid(record: Record) -> torch.Tensor:
    """Share of each layer that each token ran, `[n, L]` float; a half: one of two sublayers."""
    meta = record.meta
    routed = record.gates.float().reshape(len(record), -1, meta["units_per_layer"]).mean(2)
    ones = torch.ones(len(record), 1)
    return torch.cat([ones.expand(-1, meta["always_keep"]), routed,
                      ones.expand(-1, meta["keep_last"])], 1)


class Layout:
    """A record as a look shows it.

    Args:
        words: the record's tokens for display, where another budget of the same text has made them.

    Attributes:
        grid, shares: `[n, L]` share of every layer that each token ran; `[n, l]` of those shown.
        layers: the layers shown.
        always, rates: `[l]` whether every token runs it, and the share of tokens that ran it.
        depths: `[n]` layers shown that each token ran.
        low, high: depths at the two ends of the shades.
    """

    def __init__(self, record: Record, look: Look = Look(), words: Words | None = None):
        meta = record.meta
        self.record = record
        self.words = words or Words(record)
        self.grid = grid(record)
        self.layers = look.layers(meta["layers"])
        shares = self.grid[:, self.layers.start:self.layers.stop]
        depths = shares.sum(1)
        self.shares = shares.tolist()
        self.depths = depths.tolist()
        self.rates = shares.mean(0).tolist()
        last_routed = meta["layers"] - meta["keep_last"]
        self.always = [not meta["always_keep"] <= layer < last_routed for layer in self.layers]
        if look.fit:
            free = record.position >= meta["keep_first_tokens"]
            ends = depths[free] if free.any() else depths
            self.low, self.high = float(ends.min()), float(ends.max())
        else:
            self.low, self.high = float(sum(self.always)), float(len(self.layers))

    def level(self, i: int) -> int:
        """The shade of token `i`."""
        return level(self.depths[i], self.low, self.high)

    def skipped(self, i: int) -> list[int]:
        """Layers shown that token `i` did not run, or not wholly."""
        return [layer for layer, share in zip(self.layers, self.shares[i]) if share < 1]


def level(depth: float, low: float, high: float) -> int:
    """The shade of a depth, 0 to LEVELS - 1."""
    if high <= low:
        return LEVELS - 1
    return round((LEVELS - 1) * min(max((depth - low) / (high - low), 0.0), 1.0))


def steps(low: float, high: float) -> list[tuple[float, int]]:
    """What a legend shows: depths from `low` on, one layer apart or more, each with its shade."""
    depths = [low + i for i in range(math.floor(high - low) + 1)]
    return [(depth, level(depth, low, high))
            for depth in depths[::max(1, math.ceil(len(depths) / MOST_STEPS))]]


def lines_of(tokens: list[Shown], columns: int = ROW_COLUMNS) -> list[range]:
    """Places of the tokens that share a line of `columns` fixed-width characters."""
    lines, start, used = [], 0, 0
    for i, token in enumerate(tokens):
        if used and used + token.columns > columns:
            lines.append(range(start, i))
            start, used = i, 0
        used += token.columns
    return [*lines, range(start, len(tokens))]


# -- numbers in words -----------------------------------------------------------------------------
def number(value: float | None, digits: int = 2, unknown: str = "…") -> str:
    """`value` for display; `unknown` where it is NaN or None."""
    return unknown if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def change(value: float, digits: int, unit: str = "", unknown: str = "") -> str:
    """A difference with its sign, a minus where it is one; `unknown` where it is NaN."""
    return unknown if math.isnan(value) else f"{value:+.{digits}f}{unit}".replace("-", "−")


def said_depth(record: Record) -> str:
    """How many layers a token runs on average."""
    return f"{float(record.active_layers.mean()):.2f} of {record.meta['layers']} layers a token"


def said_perplexity(record: Record) -> str:
    """Both perplexities of a text."""
    return (f"perplexity {number(record.perplexity(), 2, '–')} routed, "
            f"{number(record.perplexity('dense'), 2, '–')} dense")


def said_plan(record: Record) -> str:
    """Which model and which threshold made the plan."""
    threshold = record.meta["threshold"]
    if record.meta["policy"] != "RouterPolicy":
        plan = f"plan: {record.meta['policy']}"
    elif threshold == -math.inf:
        plan = "every gate open"
    elif "depths" in record.meta:
        plan = f"units run at a price of {threshold:.3g} nats each"
    else:
        plan = f"gates open above a router logit of {threshold:.3f}"
    return f"{record.meta['model']}, {plan}"


def said_execution(execution: str, lora: str = "LoRA as merged") -> str:
    """What an execution, and where LoRA's products are made, mean for the times beside it."""
    if execution == "masked":
        return "every layer is computed: no gain in time"
    return f"{execution} execution, {lora}" if lora else f"{execution} execution"
