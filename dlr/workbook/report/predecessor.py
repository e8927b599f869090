"""Beside the predecessor: its published numbers, what they count, and ours on its protocol.

Published numbers lie in `figures/published.json`, with their caveats. Ours are the runs of the
phase `predecessor`. The models are not the same, so that ratios are compared: to the base, and to
LoRA at full depth.
"""

from markupsafe import Markup

from dlr.runs import METRICS, Run, alike, kind_of
from dlr.workbook.report.sources import PUBLISHED, Missing, Results
from dlr.workbook.report.tables import BLANK, Table, percent, spread

MODELS = ("smollm2-135m", "tinyllama")
NEAR = 0.02                          # skips that are as good as equal
# How its rows are called here, by the word that stands for the fact.
CAVEATS = {
    "padding": "its skip counts padded positions as well as tokens",
    "mask": "the layers dropped are one fixed set for all tokens, texts and seeds: a bad static "
            "plan, not a random one",
    "targets": "its LoRA lies on all projections, that of the dense row on attention alone",
    "june": "gates are averaged over padding, which most positions of these texts are"}


def _like(rows: list[dict], place: int, variant: str) -> int | None:
    """The row of `variant` with the seed and steps of the row at `place`, or of another seed."""
    steps, seed = rows[place]["steps"], rows[place]["seed"]
    fits = [i for i, row in enumerate(rows) if row["variant"] == variant
            and (variant == "base" or row["steps"] == steps)]
    return min(fits, key=lambda i: rows[i]["seed"] != seed) if fits else None


def _ratio(results: Results, steps: tuple, rows: list[dict], place: int, variant: str):
    other = _like(rows, place, variant)
    if other is None:
        return BLANK
    places = [(PUBLISHED, (*steps, i, "perplexity")) for i in (place, other)]
    return results.made("ratio", places, ".2f")


def _or_blank(number):
    return BLANK if number.value is None else number


def published(results: Results, model: str) -> Table:
    """The predecessor's rows on one model, with ratios to its base and to its dense LoRA."""
    steps, lines = (model, "rows"), []
    rows = results.at((PUBLISHED, steps))
    for place, row in enumerate(rows):
        cell = {name: results.published(*steps, place, name, shape=shape) for name, shape in
                (("variant", ""), ("seed", "d"), ("steps", "d"), ("skip_weight", "d"),
                 ("perplexity", ",.2f"), ("tokens_per_second", ",d"))}
        skip = results.published(*steps, place, "skip", shape=".1f", times=100)
        lines.append([cell["variant"], cell["seed"], cell["steps"], _or_blank(cell["skip_weight"]),
                      BLANK if skip.value is None else percent(skip), cell["perplexity"],
                      *(_ratio(results, steps, rows, place, other)
                        for other in ("base", "dense LoRA")),
                      _or_blank(cell["tokens_per_second"]), ", ".join(row["caveats"]) or BLANK])
    columns = ["its row", "seed", "steps", "skip weight", "skip, as it counts", "perplexity",
               "over its base", "over its dense LoRA", "tokens a second", "caveats"]
    name = results.published(model, "model")
    caption = Markup("The predecessor's published results on {}.").format(name)
    return Table(f"predecessor-{model}", caption, columns, lines, [])


def larger(results: Results) -> Table:
    """Its June rows: the depth it reports, and the depth if tokens ran all and padding least."""
    lines = []
    for place, row in enumerate(results.at((PUBLISHED, ("larger",)))):
        steps = "larger", place
        padded = [(PUBLISHED, (*steps, "kept")), (PUBLISHED, (*steps, "layers")),
                  (PUBLISHED, ("recomputed", "real_share_june"))]
        lines.append([results.published(*steps, "model"),
                      results.published(*steps, "layers", shape="d"),
                      *(_or_blank(results.published(*steps, name, shape=".2f"))
                        for name in ("base", "dense", "routed", "shown_layers")),
                      results.made("padded", padded, ".1f"), ", ".join(row["caveats"])])
    columns = ["its model", "layers", "base", "dense LoRA", "routed", "layers it reports",
               "layers that padding alone would show", "caveats"]
    return Table("predecessor-larger", "The predecessor's larger models: perplexity, and active "
                 "layers.", columns, lines, [])


# -- ours -----------------------------------------------------------------------------------------
THEIRS = "perplexity_batches"        # their average: over batches of paragraphs


def groups(results: Results) -> dict[tuple, dict[str, list[tuple]]]:
    """(model, dataset, steps) to (variant, skip trained for) to (run, place of row), a pair a seed.

    Raises:
        Missing: the phase has no finished run.
    """
    runs = {run: Run(results.root / run) for run in results.runs("predecessor")}
    if not runs:
        raise Missing("predecessor/default", "finished run")
    found = {}
    for protocol, group in alike(runs).items():
        variants = found.setdefault(protocol, {})
        for run in group:
            for place, row in enumerate(results.rows(run)):
                key = row["variant"], row.get("trained_skip")
                variants.setdefault(key, []).append((run, place))
    return found


def _average(results: Results, run: str) -> str:
    return THEIRS if THEIRS in results.rows(run)[0] else "perplexity"


def _full(results: Results, variants: dict, kind: str) -> list[tuple]:
    """The rows of the base, or of LoRA at full depth."""
    pairs = [pair for pairs in variants.values() for pair in pairs]
    return [(run, place) for run, place in pairs
            if kind_of(row := results.rows(run)[place]) == kind and not row["skip"]]


def ratio(results: Results, own: list[tuple], others: list[tuple]):
    """Mean over seeds of a row's perplexity over another's of the same seed; a dash without it.

    The base has one row, for all seeds.
    """
    places = []
    for run, place in own:
        seed = results.rows(run)[place].get("seed")
        fits = [pair for pair in others if kind_of(row := results.rows(pair[0])[pair[1]]) == "base"
                or row.get("seed") == seed]
        if not fits:
            return BLANK
        other = fits[0]
        places += [(f"{each}/{METRICS}", ("rows", i, _average(results, each)))
                   for each, i in ((run, place), other)]
    return results.made("mean ratio", places, ".2f")


def _over_seeds(results: Results, pairs: list[tuple], name: str, **look):
    places = [(f"{run}/{METRICS}", ("rows", place, name)) for run, place in pairs
              if name in results.rows(run)[place]]
    return spread(results, places, **look) if len(places) == len(pairs) else BLANK


SKIPS = {"skip": "skip of tokens", "skip_padded": "skip, padding counted"}


def ours(results: Results) -> Table:
    """Our rows of its protocol, means ± SD over seeds. Raises Missing: there is none."""
    lines, runs = [], []
    for (model, _, steps), variants in groups(results).items():
        for pairs in variants.values():
            run, place = pairs[0]
            runs += [each for each, _ in pairs]
            skips = [_over_seeds(results, pairs, name, shape=".1f", times=100) for name in SKIPS]
            ratios = [ratio(results, pairs, _full(results, variants, kind))
                      for kind in ("base", "dense")]
            asked = results.rows(run)[place].get("trained_skip")
            lines.append([results.metric(run, "rows", place, "variant"),
                          percent(results.percent(run, "rows", place, "trained_skip", shape=".0f"))
                          if asked else BLANK,
                          results.made("count", [(f"{each}/{METRICS}", ("rows", i, "variant"))
                                                 for each, i in pairs]),
                          *(skip if skip == BLANK else percent(skip) for skip in skips),
                          _over_seeds(results, pairs, "perplexity"),
                          _over_seeds(results, pairs, THEIRS), *ratios])
    columns = ["our row", "trained for", "seeds", *SKIPS.values(), "perplexity", "by their average",
               "over our base", "over our dense LoRA"]
    return Table("predecessor-ours", "Our rows on the predecessor's protocol, mean ± SD over "
                 "seeds; ratios are of perplexities by their average.", columns, lines,
                 list(dict.fromkeys(runs)))


def beside(results: Results):
    """(whether our ratio to dense LoRA is the smaller, sentence) for each row of ours that skips.

    Theirs is the row of its router on the smaller model; ours are those that skip as much or more.
    """
    rows = results.at((PUBLISHED, (MODELS[0], "rows")))
    place, dense = (next(i for i, row in enumerate(rows) if row["variant"].startswith(name))
                    for name in ("token DLR", "dense"))
    other = results.made("ratio", [(PUBLISHED, (MODELS[0], "rows", i, "perplexity"))
                                   for i in (place, dense)], ".2f")
    at = results.published(MODELS[0], "rows", place, "skip", shape=".1f", times=100)
    for variants in groups(results).values():
        others = _full(results, variants, "dense")
        for (_, asked), pairs in variants.items():
            row = results.rows(pairs[0][0])[pairs[0][1]]
            key = "skip_padded" if "skip_padded" in row else "skip"
            if kind_of(row) == "routed" and others and row[key] >= at.value - NEAR:
                own = ratio(results, pairs, others)
                if own is BLANK:
                    continue
                trained = Markup(" (trained for {}\u00a0%)").format(results.percent(
                    pairs[0][0], "rows", pairs[0][1], "trained_skip", shape=".0f")) if asked else ""
                yield own.shown < other.shown, Markup(
                    "on the predecessor's protocol {}{} has {} times the perplexity of dense LoRA "
                    "at {}\u00a0% skip of all positions; the predecessor's router has {} at "
                    "{}\u00a0%.").format(
                        results.metric(pairs[0][0], "rows", pairs[0][1], "variant"), trained,
                        own, _over_seeds(results, pairs, key, shape=".1f", times=100), other, at)


# -- what has to be known -------------------------------------------------------------------------
def facts(results: Results) -> list[Markup]:
    """What has to be known when the two are read side by side."""
    get = results.published
    pads = get("recomputed", "pad_share_september", shape=".0f", times=100)
    seeds = [(PUBLISHED, ("tinyllama", "rows", {"variant": "token DLR 30", "seed": seed,
                                                "steps": 150, "skip_weight": 1600}))
             for seed in (42, 43, 44)]
    values = [[(file, (*steps, name)) for file, steps in seeds] for name in ("perplexity", "skip")]
    return [
        Markup("Its skip is a mean over all positions, padding included ({}\u00a0% of them in its "
               "September evaluation). If padding keeps every layer, its {} is {} of the tokens."
               ).format(pads, get("recomputed", "real_skip_from", shape=".3f"),
                        get("recomputed", "real_skip_to", shape=".2f")),
        Markup("Its June models were read on paragraphs padded to a fixed length, where {}\u00a0% "
               "of the positions are tokens. A router that runs everything on tokens and the kept "
               "layers alone on padding shows the depth of the last table's last column. Where "
               "that is the depth reported, a score said to be at that depth is one near full "
               "depth.").format(
                   get("recomputed", "real_share_june", shape=".0f", times=100)),
        Markup("Its “random” and stochastic rows run one fixed mask, and it has no best static "
               "plan."),
        Markup("Its mean of {} ± {} over seeds mixes two skip weights; at one weight throughout "
               "it is {} ± {}, at skip {}.").format(
                   get("recomputed", "published_mean", shape=".2f"),
                   get("recomputed", "published_sd", shape=".2f"),
                   results.made("mean", values[0], ".2f"), results.made("SD", values[0], ".2f"),
                   results.made("mean", values[1], ".3f")),
        Markup("Its dense and stochastic rows have LoRA on attention alone, its routed rows on all "
               "projections."),
        Markup("Its distillation is summed over the {} positions of a block, so that it outweighs "
               "cross-entropy many times over.").format(get("protocol", "block", shape="d"))]
