"""A continuation as it comes: the routed text shaded by depth, the dense one beside it, tokens a second of both."""

from html import escape

from dlr.stream import Progress, Side
from dlr.tokens import visible
from dlr.views import cost_tile, framed, level, number, said_execution


def _piece(piece: str, token_id: int, spelled: dict[str, str]) -> str:
    return f"⟨{spelled[str(token_id)]}⟩" if str(token_id) in spelled else visible(piece, spaces=False)


def _tokens(side: Side, always: float, layers: int, spelled: dict[str, str], done: bool) -> str:
    out, unknown = [], "not read any more, so no depth" if done else "depth to come"
    for i, (piece, token_id) in enumerate(zip(side.pieces, side.ids)):
        depth = side.depths[i] if i < len(side.depths) else None
        text, gap = _piece(piece, token_id, spelled) or "∅", ""
        if text[0] == " " and text.strip():
            text, gap = text[1:], " "
        shade = f" dlr-l{level(depth, always, layers)}" if depth is not None else ""
        count = "" if depth is None else f"<sub>{depth:g}</sub>"
        label = escape(f"{visible(piece)}: {unknown if depth is None else f'{depth:g} layers'}", quote=True)
        out.append(f'{gap}<span class="dlr-t{shade}" tabindex=0 role=img aria-label="{label}" title="{label}">'
                   f"<bdi>{escape(text)}</bdi>{count}</span>" + ("<br>" if "\n" in piece else ""))
    return "".join(out)


def stream(progress: Progress, always: float) -> str:
    """Both continuations and their rates. `always`: layers that every token runs."""
    routed, dense = progress.routed, progress.dense
    mean = sum(routed.depths) / len(routed.depths) if routed.depths else None
    note = said_execution(progress.execution, "LoRA not merged")
    tiles = [cost_tile("routed tokens/s", number(routed.rate, 1), note),
             cost_tile("dense tokens/s", number(dense.rate, 1), "base model without adapters, interleaved"),
             cost_tile("layers a token", number(mean, 2), f"of {progress.layers}"),
             cost_tile("tokens", f"{len(routed.ids)}",
                       "stopped" if progress.stopped else "finished" if progress.done else "generating…")]
    prompt = escape(visible(progress.prompt, spaces=False).replace("↵", "↵\n"))
    plain = escape("".join(_piece(p, i, progress.bytes) for p, i in zip(dense.pieces, dense.ids)).replace("↵", "↵\n"))
    swatches = "".join(f'<i class="dlr-l{level(d, always, progress.layers)}">{d:g}</i>'
                       for d in (always + k for k in range(int(progress.layers - always) + 1)))
    return framed(
        f'<div class=dlr-tiles>{"".join(tiles)}</div><div class=dlr-two><div><h4>Routed <small>shade and number: layers '
        f'each token ran, of {progress.layers}</small></h4><div class=dlr-strip><bdi class=dlr-muted>{prompt}</bdi>'
        f"{_tokens(routed, always, progress.layers, progress.bytes, progress.done)}</div>"
        f"<div class=dlr-key>{swatches}</div></div>"
        f"<div><h4>Dense <small>the base model’s own continuation, {progress.layers} layers a token</small></h4>"
        f"<div class=dlr-strip><bdi class=dlr-muted>{prompt}</bdi><bdi>{plain}</bdi></div></div></div>", "generation")
