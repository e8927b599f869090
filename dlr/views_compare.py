"""Two records of one text side by side, and where their plans differ. Pure functions of records."""

import math
from html import escape

import torch

from dlr.palette import RUN_A, RUN_B
from dlr.record import Record
from dlr.tokens import shown, spans
from dlr.views import Cost, Look, axis, cell_height, framed, grid, lines_of, notice, number, strip


def same_text(first: Record, second: Record) -> bool:
    """Whether the two can be set against each other token by token."""
    return torch.equal(first.ids, second.ids) and first.meta["layers"] == second.meta["layers"]


def differing(first: Record, second: Record) -> set[int]:
    """Places of the tokens whose plans differ."""
    return set((grid(first) != grid(second)).any(1).nonzero().flatten().tolist())


def agreement(first: Record, second: Record) -> float:
    """Share of tokens and layers that both run or both skip."""
    return (grid(first) == grid(second)).float().mean().item()


def minus(text: str) -> str:
    """`text` with a minus sign for its hyphen."""
    return text.replace("-", "−")


def sums(first: Record, second: Record, names: tuple[str, str], costs: tuple[Cost, Cost] | None = None) -> str:
    """The two cost lines as a table, with the second minus the first."""
    rows = []
    for label, digits, pair in (
            ("skipped, %", 1, [100 * r.skip_ratio for r in (first, second)]),
            ("layers a token", 2, [float(r.active_layers.mean()) for r in (first, second)]),
            ("FLOPs, × dense", 3, [c.flops_routed / c.flops_dense for c in costs] if costs else None),
            ("perplexity, dense", 2, [r.perplexity("dense") for r in (first, second)]),
            ("perplexity, routed", 2, [r.perplexity() for r in (first, second)]),
            ("KL to dense, nats", 3, [float(r.kl.nanmean()) for r in (first, second)])):
        if pair is None:
            continue
        change = pair[1] - pair[0]
        rows.append(f"<tr><td>{escape(label)}</td><td>{number(pair[0], digits)}</td><td>{number(pair[1], digits)}</td>"
                    f"<td>{'…' if math.isnan(change) else minus(f'{change:+.{digits}f}')}</td></tr>")
    heads = "".join(f'<th><span class=dlr-swatch style="background:{colour}"></span>{escape(name)}</th>'
                    for colour, name in zip((RUN_A, RUN_B), names))
    return f"<table class=dlr-sums><tr><th></th>{heads}<th>second − first</th></tr>{''.join(rows)}</table>"


def _both_path(a: list[float], b: list[float]) -> str:
    """Cells of one column: both ran, only the first, only the second."""
    drawn = {"k": "", "a": "", "b": ""}
    for row, (x, y) in enumerate(zip(a, b)):
        for kind, share, start in (("k", min(x, y), 0.0), ("a", x - y, y), ("b", y - x, x)):
            if share > 0:
                drawn[kind] += f"M0 {row + .9 * start:g}h1v{.9 * share:g}H0z"
    return "".join(f'<path class={kind} d="{d}"></path>' for kind, d in drawn.items() if d)


def difference(first: Record, second: Record, look: Look = Look()) -> str:
    """Tokens x layers, coloured where only one of the two plans runs a layer, with the difference in depth below."""
    layers, tokens = look.layers(first), shown(first)
    tables = [grid(r)[:, layers.start:layers.stop] for r in (first, second)]
    change, height, rows = (tables[1].sum(1) - tables[0].sum(1)).tolist(), cell_height(len(layers)), []
    for line in lines_of(tokens):
        cells = [axis(layers, height)]
        for i in line:
            a, b = (t[i].tolist() for t in tables)
            only = [[n for n, x, y in zip(layers, p, q) if x > y] for p, q in ((a, b), (b, a))]
            hint = escape(f"{tokens[i].marked} · position {int(first.position[i])} · only the first: {spans(only[0])} · "
                          f"only the second: {spans(only[1])}", quote=True)
            cells.append(f'<div class=dlr-c title="{hint}"><bdi>{escape(tokens[i].marked or "∅")}</bdi>'
                         f'<svg viewBox="0 0 1 {len(layers)}" height={len(layers) * height} preserveAspectRatio=none>'
                         f'{_both_path(a, b)}</svg><b style="background:none;color:var(--fg)">'
                         f'{minus(f"{change[i]:+g}") if change[i] else "="}</b></div>')
        rows.append(f'<div class=dlr-row>{"".join(cells)}</div>')
    key = "".join(f'<span><span class=dlr-swatch style="background:{c}"></span>{t}</span>' for c, t in (
        (RUN_A, "only the first runs it"), (RUN_B, "only the second"), ("var(--kept)", "both"), ("var(--faint)", "neither")))
    said = f"{100 * agreement(first, second):.1f} % of gates and kept layers agree; numbers: second − first"
    return (f"<h4>Difference <small>{said}</small></h4><div class=dlr-heat tabindex=0 role=region "
            f'aria-label="difference of the plans">{"".join(rows)}</div><div class=dlr-key>{key}</div>')


def comparison(first: Record, second: Record, names: tuple[str, str], costs: tuple[Cost, Cost] | None = None,
               look: Look = Look(fit=False), note: str = "") -> str:
    """Two strips side by side on one ramp, differing tokens underlined, and the difference layer by layer."""
    alike = same_text(first, second)
    marked = differing(first, second) if alike else set()
    sides = "".join(
        f"<div><h4><span class=dlr-swatch style='background:{colour}'></span>{escape(name)}</h4>"
        f"<div class=dlr-main>{strip(record, look, marked, cards=False)}</div></div>"
        for colour, name, record in zip((RUN_A, RUN_B), names, (first, second)))
    below = difference(first, second, look) if alike else notice(
        "The two models cut this text into different tokens or have different numbers of layers, so their plans are shown "
        "side by side but not subtracted.")
    marks = f" {len(marked)} of {len(first):,} tokens differ and are underlined." if alike else ""
    return framed(f"{notice(note)}{sums(first, second, names, costs)}<div class=dlr-two>{sides}</div>"
                  f"<p class=dlr-muted>{marks}</p>{below}", "comparison")
