"""What can be taken away: one HTML file, PNG and PDF for a paper, CSV and JSON of the record.

Every file appears whole or not at all. The HTML file is the live view itself inside a page:
no script, no network. Text in the CSV that a spreadsheet would run as a formula has an apostrophe
before it; the JSON holds every text exactly.
"""

import csv
import io
import json
import unicodedata
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from dlr.explore.html import page
from dlr.explore.layout import Cost, Look, grid
from dlr.explore.picture import token_map
from dlr.explore.tokens import Words
from dlr.measure.record import Record
from dlr.runs import plain, results_folder, slug, write_atomically

FORMATS = ("html", "png", "pdf", "csv", "json")


def rows(record: Record) -> list[dict]:
    """One mapping a token: all that the view shows of it, unrounded (None where unknown)."""
    names = record.meta.get("top_tokens", {})
    table = grid(record)
    words = Words(record)
    tokens = []
    for i, (token, kind) in enumerate(zip(words.shown, words.kinds)):
        row = {"document": int(record.document[i]), "position": int(record.position[i]),
               "id": int(record.ids[i]), "token": record.tokens[i], "shown": token.marked,
               "category": kind, "note": token.note,
               "active_layers": float(record.active_layers[i])}
        for name in ("loss_dense", "loss_routed", "entropy_dense", "kl"):
            row[name] = float(getattr(record, name)[i])
        for which in ("dense", "routed"):
            ids = getattr(record, f"top_{which}")[i].tolist()
            row[f"top_{which}"] = [names.get(str(t)) for t in ids]
            chances = getattr(record, f"top_{which}_probability")[i].tolist()
            row[f"top_{which}_probability"] = chances
        row["layers"] = table[i].tolist()
        row["router_logits"] = record.logits[i].tolist()
        if record.harm is not None:
            row["predicted_harm"] = record.harm[i].tolist()
        tokens.append(plain(row))
    return tokens


def to_json(record: Record, cost: Cost | None = None) -> str:
    """The record as standard JSON."""
    content = {"meta": record.meta, "skip_ratio": record.skip_ratio,
               "perplexity_dense": record.perplexity("dense"),
               "perplexity_routed": record.perplexity(),
               "cost": vars(cost) if cost else None, "tokens": rows(record)}
    return json.dumps(plain(content), ensure_ascii=False, indent=1)


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet may run `text`, which it reads without spaces, quotes, unseen signs."""
    drawn = (sign for sign in text if sign not in "'\"" and not sign.isspace()
             and unicodedata.category(sign)[0] != "C")
    first = unicodedata.normalize("NFKC", next(drawn, ""))
    return text.startswith(("\t", "\r", "\n")) or first.startswith(("=", "+", "-", "@"))


def cell(value):
    """`value` for a CSV file: a text that a spreadsheet would run gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def to_csv(record: Record) -> str:
    """The record as a table, one row a token, one column a layer and a prediction.

    Tokens are written as `cell` gives them: '=' becomes "'=". For the exact texts take the JSON.
    """
    flat = []
    for row in rows(record):
        for name in ("top_dense", "top_routed", "top_dense_probability", "top_routed_probability",
                     "layers", "router_logits", "predicted_harm"):
            stem = {"layers": "layer", "router_logits": "logit"}.get(name, name)
            row |= {f"{stem}_{k}": value for k, value in enumerate(row.pop(name, ()))}
        flat.append({name: cell(value) for name, value in row.items()})
    # Texts stand in quotes: where ';' separates cells, one in a token would begin a new cell.
    return pd.DataFrame(flat).to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def picture(record: Record, kind: str = "png", look: Look = Look()) -> bytes:
    """The strip and heatmap as an image for a paper, `kind` 'png' or 'pdf'."""
    figure, file = token_map(record, look), io.BytesIO()
    figure.savefig(file, format=kind, bbox_inches="tight",
                   metadata={"CreationDate": None} if kind == "pdf" else {})
    plt.close(figure)
    return file.getvalue()


def default_folder(record: Record) -> Path:
    """results/explorer/exports/<hash of the text>-<model>-skip<percent>."""
    meta = record.meta
    name = f"{meta['text_hash']}-{meta['model']}-skip{round(100 * record.skip_ratio)}"
    return results_folder() / "explorer" / "exports" / slug(name)


def export(record: Record, view: str, folder: str | Path | None = None, cost: Cost | None = None,
           look: Look = Look(), formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes `view` and its record into `folder`; returns the files' paths.

    Raises:
        ValueError: an unknown format; OSError: the folder cannot be written.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ValueError(f"Unknown export format {unknown[0]!r}; there are html, png, pdf, csv and "
                         "json.")
    makers = {"html": lambda: page(view), "csv": lambda: to_csv(record),
              "json": lambda: to_json(record, cost) + "\n",
              "png": lambda: picture(record, "png", look),
              "pdf": lambda: picture(record, "pdf", look)}
    folder = Path(folder or default_folder(record))
    return [write_atomically(folder / f"tokens.{kind}", makers[kind]()) for kind in formats]
