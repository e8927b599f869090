"""Beside the predecessor: its published numbers, what they count, and ours on its protocol.

Published numbers lie in `published.json`, with their caveats. Ours are the runs of the phase
`predecessor`. The models are not the same, so that ratios are compared: to the base, and to LoRA at
full depth.
"""

from markupsafe import Markup

from dlr.runs import METRICS, kind_of
from dlr.workbook.report.sources import PUBLISHED, Missing, Results
from dlr.workbook.report.tables import BLANK, Table, percent

MODELS = ("smollm2-135m", "tinyllama")
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
    return Table(f"predecessor-{model}", Markup("The predecessor's published results on {}, "
                 "rows at full depth first.").format(name), columns, lines, [])


def larger(results: Results) -> Table:
    """Its June rows: the depth it reports, and the depth that padding alone would show."""
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
               "layers if every token ran all and padding the kept ones", "caveats"]
    return Table("predecessor-larger", "The predecessor's larger models: perplexity, and active "
                 "layers.", columns, lines, [])


def _number_or_blank(results: Results, run: str, place: int, name: str, **look):
    try:
        number = results.metric(run, "rows", place, name, **look)
    except Missing:
        return BLANK
    return _or_blank(number)


def _own_ratio(results: Results, run: str, place: int, kind: str):
    rows = results.rows(run)
    others = [i for i, row in enumerate(rows) if kind_of(row) == kind]
    if not others:
        return BLANK
    file = f"{run}/{METRICS}"
    same = min(others, key=lambda i: rows[i].get("seed") != rows[place].get("seed"))
    return results.made("ratio", [(file, ("rows", i, "perplexity")) for i in (place, same)], ".2f")


SKIPS = {"skip": "skip of tokens", "skip_padded": "skip, padding counted"}


def ours(results: Results) -> Table:
    """Our rows of its protocol. Raises Missing: the phase has no finished run."""
    runs = results.runs("predecessor")
    if not runs:
        raise Missing("predecessor", "finished run")
    lines = []
    for run in runs:
        for place, _ in enumerate(results.rows(run)):
            skips = [_number_or_blank(results, run, place, name, shape=".1f", times=100)
                     for name in SKIPS]
            lines.append([results.metric(run, "rows", place, "variant"),
                          _number_or_blank(results, run, place, "seed", shape="d"),
                          *(skip if skip == BLANK else percent(skip) for skip in skips),
                          results.metric(run, "rows", place, "perplexity"),
                          *(_own_ratio(results, run, place, kind) for kind in ("base", "dense"))])
    columns = ["our row", "seed", *SKIPS.values(), "perplexity", "over our base",
               "over our dense LoRA"]
    return Table("predecessor-ours", "Our rows on the predecessor's protocol.", columns, lines,
                 runs)


def facts(results: Results) -> list[Markup]:
    """What has to be known when the two are read side by side."""
    get = results.published
    pads = get("recomputed", "pad_share_september", shape=".0f", times=100)
    seeds = [(PUBLISHED, ("tinyllama", "rows", {"variant": "token DLR 30", "seed": seed,
                                                "steps": 150, "skip_weight": 1600}))
             for seed in (42, 43, 44)]
    values = [[(file, (*steps, name)) for file, steps in seeds] for name in ("perplexity", "skip")]
    return [
        Markup("Its skip is a mean over all positions, padding included ({} % of them in its "
               "September evaluation). If padding keeps every layer, its {} is {} of the tokens."
               ).format(pads, get("recomputed", "real_skip_from", shape=".3f"),
                        get("recomputed", "real_skip_to", shape=".2f")),
        Markup("Its June models were read on paragraphs padded to a fixed length, where {} % of "
               "the positions are tokens. A router that runs everything on tokens and the kept "
               "layers alone on padding shows the depth of the last table's last column. Where "
               "that is the depth reported, a score said to be at that depth is one near full "
               "depth.").format(
                   get("recomputed", "real_share_june", shape=".0f", times=100)),
        Markup("Its “random” and stochastic rows run one fixed mask, and it has no best static "
               "plan."),
        Markup("Its mean of {} ± {} over seeds mixes two skip weights; at one weight throughout it "
               "is {} ± {}, at skip {}.").format(
                   get("recomputed", "published_mean", shape=".2f"),
                   get("recomputed", "published_sd", shape=".2f"),
                   results.made("mean", values[0], ".2f"), results.made("SD", values[0], ".2f"),
                   results.made("mean", values[1], ".3f")),
        Markup("Its dense and stochastic rows have LoRA on attention alone, its routed rows on all "
               "projections."),
        Markup("Its distillation is summed over the {} positions of a block, so that it outweighs "
               "cross-entropy many times over.").format(get("protocol", "block", shape="d"))]
