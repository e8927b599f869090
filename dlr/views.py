"""What the explorer shows, as pure functions of a record: token strip, heatmap, cost line, the whole view.

All text is escaped; no script, no network, nothing but HTML and one constant style sheet, so that JupyterLab, Voilà and
a saved file show the same thing. Notation: n tokens, L layers, U routable units.
"""

import math
from dataclasses import dataclass
from html import escape

import torch

from dlr.palette import LEVELS, stylesheet
from dlr.record import Record
from dlr.tokens import Shown, kinds, shown, spans, visible, width

LONGEST = 2048                 # tokens of a text that a page shows: each is some 3 kB of it
ROW_COLUMNS = 112              # fixed-width characters a line of the heatmap holds
KEPT, RUN, SKIPPED = "k", "r", ""


@dataclass(frozen=True)
class Cost:
    """What one text costs. FLOPs in operations, times in milliseconds (medians); None = not measured."""
    flops_dense: float
    flops_routed: float
    ms_dense: float | None = None
    ms_routed: float | None = None
    ms_unmerged: float | None = None         # routed, with LoRA's products apart from the weights
    execution: str = "masked"


@dataclass(frozen=True)
class Look:
    """How a record is shown: layers `first` to `last` (inclusive), and whether the ramp spans this text's depths only."""
    first: int = 0
    last: int | None = None
    fit: bool = True

    def layers(self, record: Record) -> range:
        last = record.meta["layers"] - 1 if self.last is None else min(self.last, record.meta["layers"] - 1)
        return range(min(self.first, last), last + 1)


def grid(record: Record) -> torch.Tensor:
    """Share of each layer that each token ran, `[n, L]` float: 1, 0, or a half where attention and MLP are apart."""
    meta = record.meta
    routed = record.gates.float().reshape(len(record), -1, meta["units_per_layer"]).mean(2)
    ones = torch.ones(len(record), 1)
    return torch.cat([ones.expand(-1, meta["always_keep"]), routed, ones.expand(-1, meta["keep_last"])], 1)


def depths(record: Record, look: Look = Look()) -> torch.Tensor:
    """Layers each token ran within the look's range, `[n]`."""
    layers = look.layers(record)
    return grid(record)[:, layers.start:layers.stop].sum(1)


def bounds(record: Record, look: Look = Look()) -> tuple[float, float]:
    """Depths at the two ends of the ramp."""
    layers, meta = look.layers(record), record.meta
    if look.fit:
        found, free = depths(record, look), record.position >= meta["keep_first_tokens"]
        found = found[free] if free.any() else found
        return float(found.min()), float(found.max())
    always = sum(i < meta["always_keep"] or i >= meta["layers"] - meta["keep_last"] for i in layers)
    return float(always), float(len(layers))


def level(depth: float, low: float, high: float) -> int:
    """The step of the ramp, 0 to LEVELS - 1."""
    return LEVELS - 1 if high <= low else round((LEVELS - 1) * min(max((depth - low) / (high - low), 0.0), 1.0))


def number(value: float | None, digits: int = 2, unknown: str = "…") -> str:
    """`value` for display; `unknown` where it is NaN or None."""
    return unknown if value is None or math.isnan(value) else f"{value:,.{digits}f}"


# -- one token's card -------------------------------------------------------------------------------------------------
def _top_rows(record: Record, i: int) -> str:
    names, rows = record.meta.get("top_tokens", {}), []
    columns = [(record.top_dense[i].tolist(), record.top_dense_probability[i].tolist()),
               (record.top_routed[i].tolist(), record.top_routed_probability[i].tolist())]
    for place in range(len(columns[0][0])):
        cells = []
        for ids, chances in columns:
            known = ids[place] >= 0
            piece = names.get(str(ids[place]), "?") if known else "…"
            cells.append(f"<td><code><bdi>{escape(visible(piece))}</bdi></code></td>"
                         f"<td class=n>{number(100 * chances[place], 1, '')}{' %' if known else ''}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(rows)


def card(record: Record, i: int, token: Shown, kind: str, shares: list[float]) -> str:
    """Everything known about token `i`, as the panel that hovering or focusing it opens; `shares` of its layers ran."""
    ran, half, skipped = ([k for k, s in enumerate(shares) if test(s)] for test in (
        lambda s: s == 1, lambda s: 0 < s < 1, lambda s: s == 0))
    half = f"<br>attention or MLP only {spans(half)}" if half else ""
    last = i + 1 == len(record) or record.document[i + 1] != record.document[i]
    none = "no next token" if last else "…"
    ahead = "" if last else f" (next: <code><bdi>{escape(visible(record.tokens[i + 1]))}</bdi></code>)"
    dense, routed, kl = (number(float(v[i]), 3, none) for v in (record.loss_dense, record.loss_routed, record.kl))
    note = f"<tr><th>bytes</th><td colspan=3>{escape(token.note)}</td></tr>" if token.note else ""
    return (
        f"<span class=dlr-card role=note><q><bdi>{escape(token.marked)}</bdi></q>"
        f"<table><tr><th>token</th><td colspan=3>id {int(record.ids[i])} · position {int(record.position[i])} · "
        f"{escape(kind)}</td></tr>{note}<tr><th>layers</th><td colspan=3><b>{float(record.active_layers[i]):g}"
        f" of {record.meta['layers']}</b><br>ran {spans(ran)}{half}<br>skipped {spans(skipped)}</td></tr>"
        f"<tr><th>loss</th><td colspan=3>dense {dense} · routed {routed} nats{ahead}</td></tr>"
        f"<tr><th>KL</th><td colspan=3>{kl} nats, dense to routed</td></tr></table>"
        f"<table><tr><th colspan=2>dense predicts</th><th colspan=2>routed predicts</th></tr>{_top_rows(record, i)}</table>"
        "</span>")


# -- token strip ------------------------------------------------------------------------------------------------------
def strip(record: Record, look: Look = Look(), marked: set[int] = frozenset(), cards: bool = True) -> str:
    """The text itself, each token shaded and numbered by its depth; `marked` tokens are underlined."""
    low, high = bounds(record, look)
    found, table, tokens, labels = depths(record, look).tolist(), grid(record), shown(record), kinds(record)
    out, total = [], record.meta["layers"]
    for i, token in enumerate(tokens):
        label = escape(f"{token.marked}: {found[i]:g} layers, position {int(record.position[i])}, {labels[i]}", quote=True)
        hint = "" if cards else f' title="{label}"'
        text, gap = (token.text if token.text.strip() else token.marked) or "∅", ""
        if text[0] == " " and text.strip():             # a word's own space stands before its box: lines break there
            text, gap = text[1:], " "
        out.append(
            f'{gap}<span class="dlr-t dlr-l{level(found[i], low, high)}{" dlr-x" if i in marked else ""}" tabindex=0 '
            f'role=img aria-label="{label}"{hint} data-depth="{found[i]:g}"><bdi>{escape(text)}</bdi><sub>{found[i]:g}</sub>'
            f"{card(record, i, token, labels[i], table[i].tolist()) if cards else ''}</span>")
        if "\n" in record.tokens[i]:
            out.append("<br>")
    lines = f"of layers {look.layers(record).start}–{look.layers(record).stop - 1}" \
        if len(look.layers(record)) < total else f"of {total}"
    return (f"<h4>Text <small>shade and number: layers each token ran, {lines}</small></h4>"
            f'<div class=dlr-strip>{"".join(out)}</div>{legend(low, high)}')


def legend(low: float, high: float) -> str:
    """The ramp with its numbers."""
    steps = [low + i for i in range(math.floor(high - low) + 1)]
    steps = steps[::max(1, math.ceil(len(steps) / 17))]
    marks = "".join(f'<i class="dlr-l{level(s, low, high)}">{s:g}</i>' for s in steps)
    return f"<div class=dlr-key><span>fewer layers {marks} more</span></div>"


# -- heatmap ----------------------------------------------------------------------------------------------------------
def lines_of(tokens: list[Shown], columns: int = ROW_COLUMNS) -> list[range]:
    """Places of the tokens that share a line, when each takes the width of its text."""
    out, start, used = [], 0, 0
    for i, token in enumerate(tokens):
        need = max(3, width(token.marked))
        if used and used + need > columns:
            out.append(range(start, i))
            start, used = i, 0
        used += need
    return [*out, range(start, len(tokens))]


def cell_height(layers: int) -> int:
    """Pixels a layer takes in the heatmap."""
    return max(4, min(11, 352 // max(layers, 1)))


def axis(layers: range, height: int) -> str:
    step = 1 if height >= 9 else 2 if height >= 6 else 4
    marks = "".join(f'<text x=26 y={(i + 1) * height - 1.5} text-anchor=end>{layer}</text>'
                    for i, layer in enumerate(layers) if layer % step == 0)
    return (f'<div class=dlr-axis><svg width=30 height={len(layers) * height} role=img aria-label="layer numbers">{marks}'
            "</svg><small>total</small></div>")


def _margin(rates: list[float], height: int) -> str:
    """Per-layer totals: the share of all tokens that ran each layer."""
    step = 1 if height >= 9 else 2 if height >= 6 else 4
    marks = "".join(
        f"<rect x=4 y={i * height + 1} width={max(0.5, 44 * rate):.1f} height={height - 2}></rect>"
        + (f"<text x=52 y={(i + 1) * height - 1.5}>{100 * rate:.0f} %</text>" if i % step == 0 else "")
        for i, rate in enumerate(rates))
    said = escape("share of tokens that ran each layer: " + ", ".join(f"{100 * r:.0f} %" for r in rates), quote=True)
    return (f'<div class=dlr-axis><svg width=84 height={len(rates) * height} role=img aria-label="{said}">{marks}</svg>'
            "</div>")


def _path(shares: list[float], always: list[bool]) -> str:
    """Cells of one column as two paths in a box of 1 x L; half a cell where half the layer ran."""
    drawn = {KEPT: "", RUN: ""}
    for row, share in enumerate(shares):
        if share > 0:
            drawn[KEPT if always[row] else RUN] += f"M0 {row}h1v{.9 * share:g}H0z"
    return "".join(f'<path class={kind} d="{d}"></path>' for kind, d in drawn.items() if d)


def heatmap(record: Record, look: Look = Look()) -> str:
    """Tokens x layers under the text, line by line, with totals per token (below) and per layer (right)."""
    layers, tokens, table = look.layers(record), shown(record), grid(record)
    table = table[:, layers.start:layers.stop]
    low, high = bounds(record, look)
    found, meta, height = table.sum(1).tolist(), record.meta, cell_height(len(layers))
    always = [i < meta["always_keep"] or i >= meta["layers"] - meta["keep_last"] for i in layers]
    left, margin = axis(layers, height), _margin(table.mean(0).tolist(), height)
    rows = []
    for line in lines_of(tokens):
        cells = [left]
        for i in line:
            missing = [layer for layer, share in zip(layers, table[i].tolist()) if share < 1]
            hint = escape(f"{tokens[i].marked} · position {int(record.position[i])} · {found[i]:g} layers · "
                          f"skipped {spans(missing)}", quote=True)
            cells.append(f'<div class="dlr-c dlr-l{level(found[i], low, high)}" title="{hint}"><bdi>'
                         f'{escape(tokens[i].marked or "∅")}</bdi><svg viewBox="0 0 1 {len(layers)}" height='
                         f'{len(layers) * height} preserveAspectRatio=none>{_path(table[i].tolist(), always)}</svg>'
                         f"<b>{found[i]:g}</b></div>")
        rows.append(f'<div class=dlr-row>{"".join(cells)}{margin}</div>')
    key = ('<span><span class="dlr-swatch" style="background:var(--kept)"></span>always kept</span>'
           f'<span class="dlr-l{LEVELS - 4}"><span class="dlr-swatch" style="background:var(--c)"></span>run (shade: the '
           'token’s depth)</span><span><span class="dlr-swatch" style="background:var(--faint);outline:1px solid '
           'var(--line)"></span>skipped</span><span>bars: share of all tokens that ran the layer</span>')
    return (f"<h4>Layers <small>one column a token, first layer on top; position and layers skipped on hover</small></h4>"
            f'<div class=dlr-heat tabindex=0 role=region aria-label="tokens by layers">{"".join(rows)}</div>'
            f"<div class=dlr-key>{key}</div>")


# -- cost line --------------------------------------------------------------------------------------------------------
def cost_tile(label: str, value: str, note: str = "", hint: str = "") -> str:
    return (f'<div class=dlr-tile title="{escape(hint, quote=True)}"><span>{escape(label)}</span><b>{escape(value)}</b>'
            f"<small>{escape(note)}</small></div>")


def said_execution(execution: str, lora: str = "LoRA as merged") -> str:
    """What an execution, and where LoRA's products are made, mean for the times beside it."""
    if execution == "masked":
        return "every layer is computed: no gain in time"
    return f"{execution} execution, {lora}"


def cost_line(record: Record, cost: Cost | None = None) -> str:
    """Measured skip, depth, FLOPs, milliseconds and perplexity for this very text."""
    gates, total = record.gates.numel(), record.meta["layers"]
    dense, routed = record.perplexity("dense"), record.perplexity("routed")
    change = "" if math.isnan(routed) or math.isnan(dense) else f"{100 * (routed / dense - 1):+.1f} %".replace("-", "−")
    blank = "…" if len(record) > 1 else "–"
    tiles = [cost_tile("skipped", f"{100 * record.skip_ratio:.1f} %", f"of {gates:,} routable gates",
                   "1 − mean gate over all tokens and routable layers"),
             cost_tile("layers a token", f"{float(record.active_layers.mean()):.2f}", f"of {total}, {len(record):,} tokens")]
    if cost is not None:
        tiles.append(cost_tile("FLOPs against dense", f"{cost.flops_routed / cost.flops_dense:.3f} ×",
                           f"{cost.flops_routed / 1e9:.2f} of {cost.flops_dense / 1e9:.2f} G",
                           "closed form; skipped layers still make keys and values; the router counts"))
        note = said_execution(cost.execution)
        unmerged = "" if cost.ms_unmerged is None else f"; with LoRA not merged {cost.ms_unmerged:.1f} ms"
        tiles.append(cost_tile("milliseconds, routed / dense", f"{number(cost.ms_routed, 0)} / {number(cost.ms_dense, 0)}",
                           note, "one forward pass of this text with the logits of its last token, as a prompt is read; "
                           "medians of interleaved runs; routed runs this plan and "
                           f"its router on the weights of the base model; {cost.execution} execution{unmerged}"))
    tiles.append(cost_tile("perplexity, routed / dense", f"{number(routed, 2, blank)} / {number(dense, 2, '–')}",
                       change or ("recomputing…" if len(record) > 1 else "needs two tokens"),
                       "exp of the mean loss of the predicted tokens of this text"))
    return f'<div class=dlr-tiles>{"".join(tiles)}</div>'


# -- the whole --------------------------------------------------------------------------------------------------------
def framed(body: str, label: str = "explorer") -> str:
    """`body` with the style sheet, in the frame every view shares."""
    return f'<style>{stylesheet()}</style><div class=dlr role=group aria-label="{escape(label, quote=True)}">{body}</div>'


def notice(text: str) -> str:
    return f"<p class=dlr-note>{escape(text)}</p>" if text else ""


def caption(record: Record) -> str:
    """Which model and which threshold made the plan."""
    return f"<p class=dlr-by>{escape(said_plan(record))}</p>"


def said_plan(record: Record) -> str:
    """The same in plain text."""
    threshold = record.meta["threshold"]
    plan = f"plan: {record.meta['policy']}" if record.meta["policy"] != "RouterPolicy" else \
        "every gate open" if threshold == -math.inf else f"gates open above a router logit of {threshold:.3f}"
    return f"{record.meta['model']}, {plan}"


def message(error: BaseException | str) -> str:
    """An error, said in the view."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return framed(f"<div class=dlr-error role=alert>{escape(text)}</div>", "error")


def view(record: Record, cost: Cost | None = None, look: Look = Look(), note: str = "") -> str:
    """Cost line, token strip and heatmap of one record."""
    hint = ("<div class=dlr-card><small>Hover over a token, or move to it with Tab: what it is, the layers it ran, its "
            "losses and what both models predict next.</small></div>")
    return framed(f"{notice(note)}{cost_line(record, cost)}{caption(record)}"
                  f"<div class=dlr-main>{strip(record, look)}{hint}</div>"
                  f"{heatmap(record, look)}", "depth of every token")
