"""What the explorer shows, as pure functions: one record, two compared, a continuation.

Every text goes through templates that escape it. No script, no network, nothing but HTML and one
constant style sheet, so that JupyterLab, Voilà and a saved file show the same thing.
"""

import base64
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dlr.explore.curve import harm_curve
from dlr.explore.layout import (Cost, Layout, Look, change, level, lines_of, number, said_execution,
                                said_plan, steps)
from dlr.explore.stream import Progress
from dlr.explore.style import ink, ramp
from dlr.explore.tokens import Words, spans, visible
from dlr.measure.record import Record

LONGEST = 2048                 # tokens of a text that a page shows: each is some 3 kB of it
HEIGHT = 352                   # pixels of a heatmap's column, where that gives layers of 4 to 11
MIME = {".html": "text/html", ".png": "image/png", ".pdf": "application/pdf", ".csv": "text/csv",
        ".json": "application/json"}
FOLDER = Path(__file__).parent / "templates"
_TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True,
                         undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.filters.update(g="{:g}".format, ink=ink, spans=spans, visible=visible)


def render(template: str, **values) -> Markup:
    """A template filled with `values`, every one of them escaped unless a template made it."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


@lru_cache(maxsize=1)
def stylesheet() -> Markup:
    """The one style sheet of all views."""
    return render("style.css", light=ramp(), dark=ramp(dark=True))


_TEMPLATES.globals["stylesheet"] = stylesheet


# -- tiles ----------------------------------------------------------------------------------------
class Tile(NamedTuple):
    """One number of the cost line."""
    label: str
    value: str
    note: str = ""
    hint: str = ""


def cost_tiles(record: Record, cost: Cost | None = None) -> list[Tile]:
    """Measured skip, depth, FLOPs, milliseconds and perplexity of this very text."""
    dense, routed, several = record.perplexity("dense"), record.perplexity(), len(record) > 1
    pending = "recomputing…" if several else "needs two tokens"
    depth = Tile("layers a token", f"{float(record.active_layers.mean()):.2f}",
                 f"of {record.meta['layers']}, {len(record):,} tokens")
    tiles = [Tile("skipped", f"{100 * record.skip_ratio:.1f} %",
                  f"of {record.gates.numel():,} routable gates",
                  "1 − mean gate over all tokens and routable layers"), depth]
    if cost is not None:
        unmerged = "" if cost.ms_unmerged is None else \
            f"; with LoRA not merged {cost.ms_unmerged:.1f} ms"
        tiles += [
            Tile("FLOPs against dense", f"{cost.ratio:.3f} ×",
                 f"{cost.flops_routed / 1e9:.2f} of {cost.flops_dense / 1e9:.2f} G",
                 "closed form; skipped layers still make keys and values; the router counts"),
            Tile("milliseconds, routed / dense",
                 f"{number(cost.ms_routed, 0)} / {number(cost.ms_dense, 0)}",
                 said_execution(cost.execution),
                 "one forward pass of this text with the logits of its last token, as a prompt is "
                 "read; medians of interleaved runs; routed runs this plan and its router on the "
                 f"weights of the base model; {cost.execution} execution{unmerged}")]
    return [*tiles,
            Tile("perplexity, routed / dense",
                 f"{number(routed, 2, '…' if several else '–')} / {number(dense, 2, '–')}",
                 change(100 * (routed / dense - 1), 1, " %", pending),
                 "exp of the mean loss of the predicted tokens of this text")]


# -- strip ----------------------------------------------------------------------------------------
def _boxed(text: str, piece: str, label: str, depth: float | None, shade: int | None) -> dict:
    """A token of a strip. A word's own space stands before its box, so that lines break there."""
    gap = " " if text[:1] == " " and text.strip() else ""
    return {"text": text[len(gap):] or "∅", "gap": gap, "label": label, "depth": depth,
            "level": shade, "newline": "\n" in piece, "marked": False, "card": None}


def _predictions(record: Record, which: str, i: int) -> list[tuple[str, str]]:
    """Likeliest next tokens at place `i` and their chances, '…' where unknown."""
    names = record.meta.get("top_tokens", {})
    ids = getattr(record, f"top_{which}")[i].tolist()
    chances = getattr(record, f"top_{which}_probability")[i].tolist()
    return [("…", "") if token < 0 else (names.get(str(token), "?"), f"{100 * chance:,.1f} %")
            for token, chance in zip(ids, chances)]


def _card(layout: Layout, i: int) -> dict:
    """Everything known about token `i`: the panel that hovering or focusing it opens."""
    record, shown, shares = layout.record, layout.words.shown[i], layout.grid[i].tolist()
    last = i + 1 == len(record) or bool(record.document[i + 1] != record.document[i])
    columns = (_predictions(record, which, i) for which in ("dense", "routed"))
    losses = {name: number(float(getattr(record, name)[i]), 3, "no next token" if last else "…")
              for name in ("loss_dense", "loss_routed", "kl")}
    return losses | {
        "marked": shown.marked, "note": shown.note, "kind": layout.words.kinds[i],
        "id": int(record.ids[i]), "position": int(record.position[i]),
        "active": float(record.active_layers[i]), "layers": record.meta["layers"],
        "ran": [layer for layer, share in enumerate(shares) if share == 1],
        "half": [layer for layer, share in enumerate(shares) if 0 < share < 1],
        "skipped": [layer for layer, share in enumerate(shares) if share == 0],
        "next": None if last else record.tokens[i + 1], "top": list(zip(*columns)),
        "curve": harm_curve(record, i)}


def strip(layout: Layout, marked: Iterable[int] = (), cards: bool = True) -> Markup:
    """The text, each token shaded and numbered by its depth; `marked` tokens are underlined."""
    record, words, layers = layout.record, layout.words, layout.layers
    tokens = []
    for i, (token, depth) in enumerate(zip(words.shown, layout.depths)):
        label = (f"{token.marked}: {depth:g} layers, position {int(record.position[i])}, "
                 f"{words.kinds[i]}")
        text = token.text if token.text.strip() else token.marked
        tokens.append(_boxed(text, record.tokens[i], label, depth, layout.level(i))
                      | {"marked": i in marked, "card": _card(layout, i) if cards else None})
    total = record.meta["layers"]
    counted = total if len(layers) == total else f"layers {layers.start}–{layers.stop - 1}"
    return render("shaded_text.html", tokens=tokens, hint=not cards, counted=counted,
                  steps=steps(layout.low, layout.high))


# -- heatmaps -------------------------------------------------------------------------------------
def _paths(cells: Iterable[tuple[str, int, float, float]]) -> dict[str, str]:
    """SVG paths of a column by class; a cell has a class, a row, a start and a share of the row."""
    paths: dict[str, str] = defaultdict(str)
    for kind, row, start, share in cells:
        if share > 0:
            paths[kind] += f"M0 {row + .9 * start:g}h1v{.9 * share:g}H0z"
    return paths


def _heat(template: str, layout: Layout, columns: list[dict], **values) -> Markup:
    height = max(4, min(11, HEIGHT // max(len(layout.layers), 1)))
    step = 1 if height >= 9 else 2 if height >= 6 else 4
    return render(template, layers=layout.layers, lines=lines_of(layout.words.shown), height=height,
                  columns=columns, step=step, **values)


def heatmap(layout: Layout) -> Markup:
    """Tokens x layers under the text, line by line, with totals per token and per layer."""
    classes = ["k" if always else "r" for always in layout.always]
    columns = []
    for i, (token, depth, shares) in enumerate(
            zip(layout.words.shown, layout.depths, layout.shares)):
        cells = ((kind, row, 0, share) for row, (kind, share) in enumerate(zip(classes, shares)))
        columns.append({"text": token.marked, "foot": f"{depth:g}", "paths": _paths(cells),
                        "shade": f"dlr-l{layout.level(i)}",
                        "hint": f"{token.marked} · position {int(layout.record.position[i])} · "
                                f"{depth:g} layers · skipped {spans(layout.skipped(i))}"})
    return _heat("grid_layers.html", layout, columns, rates=layout.rates)


def difference(first: Layout, second: Layout) -> Markup:
    """Tokens x layers, coloured where one of two plans alone runs a layer; below, by how many."""
    columns = []
    for i, (token, a, b) in enumerate(zip(first.words.shown, first.shares, second.shares)):
        more = second.depths[i] - first.depths[i]
        only = [spans([layer for layer, x, y in zip(first.layers, p, q) if x > y])
                for p, q in ((a, b), (b, a))]
        cells = [cell for row, (x, y) in enumerate(zip(a, b)) for cell in (
            ("k", row, 0, min(x, y)), ("a", row, y, x - y), ("b", row, x, y - x))]
        columns.append({"text": token.marked, "shade": "dlr-d", "paths": _paths(cells),
                        "foot": f"{more:+g}".replace("-", "−") if more else "=",
                        "hint": f"{token.marked} · position {int(first.record.position[i])} · "
                                f"only the first: {only[0]} · only the second: {only[1]}"})
    return _heat("grid_difference.html", first, columns, agreement=agreement(first, second))


# -- views ----------------------------------------------------------------------------------------
def view(record: Record, cost: Cost | None = None, look: Look = Look(), note: str = "",
         words: Words | None = None) -> Markup:
    """Cost line, token strip and heatmap of one record; `words` as in `Layout`."""
    layout = Layout(record, look, words)
    return render("view.html", note=note, tiles=cost_tiles(record, cost), plan=said_plan(record),
                  strip=strip(layout), heatmap=heatmap(layout))


def message(error: BaseException | str) -> Markup:
    """An error, said in the view."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return render("message.html", text=text)


def same_text(first: Record, second: Record) -> bool:
    """Whether the two can be set against each other token by token."""
    return torch.equal(first.ids, second.ids) and first.meta["layers"] == second.meta["layers"]


def differing(first: Layout, second: Layout) -> set[int]:
    """Places of the tokens whose plans differ."""
    return set((first.grid != second.grid).any(1).nonzero().flatten().tolist())


def agreement(first: Layout, second: Layout) -> float:
    """Share of tokens and layers that both run or both skip."""
    return (first.grid == second.grid).float().mean().item()


def sums(first: Record, second: Record, costs: tuple[Cost, Cost] | None = None) -> list[list[str]]:
    """The two cost lines as rows of a table: label, first, second, second minus first."""
    pair = (first, second)
    numbers = [("skipped, %", 1, [100 * r.skip_ratio for r in pair]),
               ("layers a token", 2, [float(r.active_layers.mean()) for r in pair]),
               *([("FLOPs, × dense", 3, [cost.ratio for cost in costs])] if costs else []),
               ("perplexity, dense", 2, [r.perplexity("dense") for r in pair]),
               ("perplexity, routed", 2, [r.perplexity() for r in pair]),
               ("KL to dense, nats", 3, [float(r.kl.nanmean()) for r in pair])]
    return [[label, number(one, digits), number(two, digits), change(two - one, digits, "", "…")]
            for label, digits, (one, two) in numbers]


def comparison(first: Record, second: Record, names: tuple[str, str],
               costs: tuple[Cost, Cost] | None = None, look: Look = Look(fit=False),
               note: str = "") -> Markup:
    """Two strips on one ramp; of the same tokens, differences are underlined and shown by layer."""
    alike = same_text(first, second)
    left = Layout(first, look)
    right = Layout(second, look, left.words if alike else None)
    marked = differing(left, right) if alike else set()
    strips = [strip(layout, marked, cards=False) for layout in (left, right)]
    return render("comparison.html", note=note, sides=list(zip(names, strips)), tokens=len(first),
                  sums=sums(first, second, costs), differing=len(marked),
                  difference=difference(left, right) if alike else "")


# -- a continuation -------------------------------------------------------------------------------
def _piece(piece: str, token_id: int, spelled: dict[str, str]) -> str:
    known = spelled.get(str(token_id))
    return visible(piece, spaces=False) if known is None else f"⟨{known}⟩"


def _broken(text: str) -> str:
    """`text` with its lines broken after the sign for it."""
    return text.replace("↵", "↵\n")


def stream(progress: Progress, always: float) -> Markup:
    """A continuation as it comes: routed text shaded by depth, dense text, and the rates of both.
    `always`: layers that every token runs."""
    routed, dense, layers = progress.routed, progress.dense, progress.layers
    unknown = "not read any more, so no depth" if progress.done else "depth to come"
    boxes = []
    for i, (piece, token) in enumerate(zip(routed.pieces, routed.ids)):
        depth = routed.depths[i] if i < len(routed.depths) else None
        label = f"{visible(piece)}: {unknown if depth is None else f'{depth:g} layers'}"
        shade = None if depth is None else level(depth, always, layers)
        boxes.append(_boxed(_piece(piece, token, progress.bytes), piece, label, depth, shade))
    mean = sum(routed.depths) / len(routed.depths) if routed.depths else None
    state = "stopped" if progress.stopped else "finished" if progress.done else "generating…"
    tiles = [Tile("routed tokens/s", number(routed.rate, 1),
                  said_execution(progress.execution, progress.lora)),
             Tile("dense tokens/s", number(dense.rate, 1),
                  "base model without adapters, interleaved"),
             Tile("layers a token", number(mean, 2), f"of {layers}"),
             Tile("tokens", f"{len(routed.ids)}", state)]
    plain = "".join(_piece(p, i, progress.bytes) for p, i in zip(dense.pieces, dense.ids))
    return render("stream.html", tiles=tiles, layers=layers, tokens=boxes, dense=_broken(plain),
                  prompt=_broken(visible(progress.prompt, spaces=False)),
                  steps=steps(always, layers))


# -- files ----------------------------------------------------------------------------------------
def page(view: str, title: str = "Dynamic Layer Routing") -> Markup:
    """A page of its own around a view, which is HTML."""
    return render("page.html", view=Markup(view), title=title)


def saved(paths: list[Path]) -> Markup:
    """Where files were written, and a link to each."""
    links = Markup(" · ").join(map(link, paths))
    place = "/".join(paths[0].parent.parts[-3:])
    return Markup("Written to <code>{}</code>: {}").format(place, links)


def link(path: Path) -> Markup:
    """A link that saves a file from the page it stands in, wherever that page is served from."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<a download="{0}" href="data:{1};base64,{2}">{0}</a>').format(
        path.name, MIME[path.suffix], data)
