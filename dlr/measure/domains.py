"""Measurements domain by domain, of tables that `evaluate` made on a mixture (`dlr.base.mixture`).

Every function takes `domains`, one a document, as `Documents.domains` holds them: column doc of a
table is the place in it. Intervals are over the domain's own documents; where these are pieces of
a few books, the interval is of those books and says little of others.
"""

import pandas as pd

from dlr.measure.evaluate import paired_difference, summary


def by_domain(table: pd.DataFrame, domains: list[str]) -> dict[str, pd.DataFrame]:
    """The rows of `table` of each domain that it has documents of, by name.

    Raises:
        ValueError: the dataset has no domains, or the table's documents are not of it.
    """
    if not domains:
        raise ValueError("A table by domain needs a dataset with domains, and this one has none; "
                         "python -m dlr mixture --help says how to make one.")
    if not table["doc"].between(0, len(domains) - 1).all():
        raise ValueError(f"The table has document {table['doc'].max()}, but domains are known of "
                         f"{len(domains)} documents; give the domains of the same split.")
    names = table["doc"].map(dict(enumerate(domains)))
    return {name: part.reset_index(drop=True) for name, part in table.groupby(names.to_numpy())}


def domain_rows(table: pd.DataFrame, domains: list[str], always_run: int,
                units_per_layer: int = 1) -> list[dict]:
    """`evaluate.summary` of each domain: perplexity with its interval, skip, and KL if measured."""
    return [{"domain": name, **summary(part, always_run, units_per_layer)}
            for name, part in by_domain(table, domains).items()]


def domain_differences(first: pd.DataFrame, second: pd.DataFrame,
                       domains: list[str]) -> list[dict]:
    """`evaluate.paired_difference` of each domain, in nats a token, and its documents.

    Negative: `first` predicts the domain better.

    Raises:
        ValueError: the tables are not of the same documents.
    """
    firsts, seconds = by_domain(first, domains), by_domain(second, domains)
    if firsts.keys() != seconds.keys():
        raise ValueError("A paired difference needs two tables of the same documents; these are of "
                         f"{', '.join(firsts)} and of {', '.join(seconds)}.")
    return [{"domain": name, **paired_difference(firsts[name], seconds[name]),
             "documents": len(firsts[name])} for name in firsts]
