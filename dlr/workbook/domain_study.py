"""A static plan a domain: a control of notebook 09 for datasets that are mixtures."""

import pandas as pd

from dlr.base.data import Documents, load_documents
from dlr.measure.depth import static_mixture
from dlr.measure.labels import HarmLabels, label_batch
from dlr.measure.static import greedy_order_by_kl
from dlr.progress import tqdm
from dlr.train.prepare import batches_of
from dlr.workbook.study import Bench


def orders_by_domain(bench: Bench, routing, config) -> dict[str, list[int]]:
    """The greedy static order of each domain of the training split, by KL on its own text."""
    train = load_documents(config.dataset, "train")
    orders = {}
    for domain in sorted(set(train.domains)):
        texts = [text for text, its in zip(train.texts, train.domains) if its == domain]
        batches = batches_of(Documents(train.source, "train", texts, train.hash),
                             bench.tokenizer, config, 1, config.order_tokens)
        orders[domain] = greedy_order_by_kl(bench.base, routing, batches, config.candidates)
    return orders


def only(batches: list[dict], rows: set[int]) -> list[dict]:
    """The batches without the documents whose places are not in `rows`."""
    parts = []
    for batch in batches:
        chosen = [place for place, row in enumerate(batch["row"].tolist()) if row in rows]
        if chosen:
            parts.append({name: tensor[chosen] for name, tensor in batch.items()})
    return parts


def static_by_domain(bench: Bench, routing, config) -> pd.DataFrame:
    """Summed KL of each document under its domain's own static plans: budget, document, kl.

    Every domain skips the same share, by the best mixture of two prefixes of its own order.
    """
    domains = load_documents(config.dataset, "test").domains
    own = routing.router.order.tolist()
    frames = []
    try:
        for domain, order in orders_by_domain(bench, routing, config).items():
            routing.router.set_order(order)
            rows = {place for place, its in enumerate(domains) if its == domain}
            batches = tqdm(only(bench.test, rows), desc=f"static plan, {domain}", unit="batch")
            labels = HarmLabels.joined([label_batch(bench.base, routing, batch)
                                        for batch in batches])
            for budget in config.budgets:
                kl = static_mixture(labels.harm, routing.router.depths.cpu(), budget,
                                    routing.units)
                frames.append(pd.DataFrame({"budget": budget,
                                            "document": labels.document.numpy(),
                                            "static by domain": kl.double().numpy()}))
    finally:
        routing.router.set_order(own)
    return pd.concat(frames).groupby(["budget", "document"], as_index=False).sum()
