"""Numbers of a document table as the predecessor's evaluation counts them, beside our own."""

import math

import pandas as pd

BATCH = 8           # paragraphs a batch, in their order


def counted_by_batches(table: pd.DataFrame, batch: int = BATCH) -> dict:
    """Perplexity over batches, and skip with padding, of a table of `evaluate.evaluate`.

    Returns:
        perplexity_batches: exp of the mean over batches of their mean loss a token. The last batch
            counts as much as the others, however few documents it holds.
        skip_padded: 1 - mean gate over all positions and units, padding too. Documents must have
            been padded to one length.
    """
    batches = table.groupby(table["doc"] // batch)[["nll", "predicted"]].sum()
    keep = table.filter(like="keep_")
    kept = keep.to_numpy().sum() + table["padding_kept"].sum()
    positions = (table["tokens"] + table["padding"]).sum()
    return {"perplexity_batches": math.exp((batches["nll"] / batches["predicted"]).mean()),
            "skip_padded": float(1 - kept / (positions * keep.shape[1]))}
