"""What can be taken away: one HTML file, PNG and PDF for a paper, CSV and JSON of the record.

Every file appears whole or not at all. The HTML file is the live view itself inside a page: no script, no network. Text
in the CSV that a spreadsheet would run as a formula has an apostrophe before it; the JSON holds every text exactly.
"""

import base64
import csv
import io
import json
import unicodedata
from html import escape
from pathlib import Path

import pandas as pd

from dlr.record import Record
from dlr.runs import plain, results_folder, slug, write_atomically
from dlr.tokens import kinds, shown
from dlr.views import Cost, Look, grid

MIME = {".html": "text/html", ".png": "image/png", ".pdf": "application/pdf", ".csv": "text/csv",
        ".json": "application/json"}


def page(view: str, title: str = "Dynamic Layer Routing") -> str:
    """A page of its own around a view."""
    return (f'<!doctype html>\n<html lang=en class=dlr-page><head><meta charset=utf-8><meta name=viewport '
            f'content="width=device-width"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            f'style-src \'unsafe-inline\'"><meta name=color-scheme content="light dark"><title>{escape(title)}</title></head>'
            f'<body style="margin:24px auto;max-width:1320px;padding:0 16px">\n{view}\n</body></html>\n')


def rows(record: Record) -> list[dict]:
    """One mapping a token: all that the view shows of it, unrounded (None where unknown)."""
    names, table = record.meta.get("top_tokens", {}), grid(record)
    out = []
    for i, (token, kind) in enumerate(zip(shown(record), kinds(record))):
        row = {"document": int(record.document[i]), "position": int(record.position[i]), "id": int(record.ids[i]),
               "token": record.tokens[i], "shown": token.marked, "category": kind, "note": token.note,
               "active_layers": float(record.active_layers[i])}
        row |= {name: float(getattr(record, name)[i]) for name in ("loss_dense", "loss_routed", "entropy_dense", "kl")}
        for which in ("dense", "routed"):
            ids = getattr(record, f"top_{which}")[i].tolist()
            row[f"top_{which}"] = [names.get(str(t)) for t in ids]
            row[f"top_{which}_probability"] = getattr(record, f"top_{which}_probability")[i].tolist()
        row["layers"] = table[i].tolist()
        row["router_logits"] = record.logits[i].tolist()
        out.append(plain(row))
    return out


def to_json(record: Record, cost: Cost | None = None) -> str:
    """The record as standard JSON."""
    return json.dumps(plain({"meta": record.meta, "skip_ratio": record.skip_ratio,
                             "perplexity_dense": record.perplexity("dense"), "perplexity_routed": record.perplexity(),
                             "cost": vars(cost) if cost else None, "tokens": rows(record)}), ensure_ascii=False, indent=1)


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet may run `text`, also after what it drops (spaces, quotes, unseen signs) and in other widths."""
    first = next((sign for sign in text if sign not in "'\"" and not sign.isspace() and unicodedata.category(sign)[0] != "C"), "")
    return text.startswith(("\t", "\r", "\n")) or unicodedata.normalize("NFKC", first).startswith(("=", "+", "-", "@"))


def cell(value):
    """`value` for a CSV file: a text that a spreadsheet would run gets an apostrophe; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def to_csv(record: Record) -> str:
    """The record as a table, one row a token, one column a layer and a prediction.

    Tokens are written as `cell` gives them: '=' becomes "'=". For the exact texts take the JSON.
    """
    flat = []
    for row in rows(record):
        for name in ("top_dense", "top_routed", "top_dense_probability", "top_routed_probability", "layers",
                     "router_logits"):
            stem = {"layers": "layer", "router_logits": "logit"}.get(name, name)
            row |= {f"{stem}_{k}": value for k, value in enumerate(row.pop(name))}
        flat.append({name: cell(value) for name, value in row.items()})
    # texts in quotes: a spreadsheet whose separator is ';' would begin a cell after the one in a token
    return pd.DataFrame(flat).to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def picture(record: Record, kind: str = "png", look: Look = Look()) -> bytes:
    """The strip and heatmap as an image for a paper, `kind` 'png' or 'pdf'."""
    import matplotlib.pyplot as plt

    from dlr.figures_explorer import token_map
    figure, out = token_map(record, look), io.BytesIO()
    figure.savefig(out, format=kind, bbox_inches="tight", metadata={"CreationDate": None} if kind == "pdf" else {})
    plt.close(figure)
    return out.getvalue()


def default_folder(record: Record) -> Path:
    """results/explorer/exports/<hash of the text>-<model>-skip<percent>."""
    name = slug(f"{record.meta['text_hash']}-{record.meta['model']}-skip{round(100 * record.skip_ratio)}")
    return results_folder() / "explorer" / "exports" / name


def export(record: Record, view: str, folder: str | Path | None = None, cost: Cost | None = None, look: Look = Look(),
           formats: tuple[str, ...] = ("html", "png", "pdf", "csv", "json")) -> list[Path]:
    """Writes `view` and its record into `folder`; returns the files' paths.

    Raises:
        ValueError: an unknown format; OSError: the folder cannot be written.
    """
    unknown = sorted(set(formats) - {"html", "png", "pdf", "csv", "json"})
    if unknown:
        raise ValueError(f"Unknown export format {unknown[0]!r}; there are html, png, pdf, csv and json.")
    folder, made = Path(folder or default_folder(record)), []
    for kind in formats:
        path = folder / f"tokens.{kind}"
        if kind in ("png", "pdf"):
            write_atomically(path, picture(record, kind, look))
        else:
            write_atomically(path, page(view) if kind == "html" else
                             to_csv(record) if kind == "csv" else to_json(record, cost) + "\n")
        made.append(path)
    return made


def link(path: Path) -> str:
    """A link that saves a file from the page it stands in, wherever that page is served from."""
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.name, quote=True)
    return f'<a download="{name}" href="data:{MIME[path.suffix]};base64,{data}">{name}</a>'
