"""What a run shows, in sentences computed from its rows: a notebook's last words fit its table."""

import pandas as pd

from dlr.runs import KINDS, kind_of

NOTHING = "No row of this run says more than the table."
# Of two perplexities or losses, lower is better; of two accuracies, higher.
REVERSED = {"better than": "worse than", "worse than": "better than"}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _side(value: float, other: float) -> str:
    """How a perplexity lies to another one; equal to two decimals is as good."""
    if round(value, 2) == round(other, 2):
        return "as good as"
    return "better than" if value < other else "worse than"


def against(interval: dict) -> str:
    """Where an interval of differences lies, of which lower ones are better."""
    if interval["high"] < 0:
        return "better than"
    return "worse than" if interval["low"] > 0 else "not distinguishable from"


def _text(paragraphs: list[str], nothing: str = NOTHING) -> str:
    return "\n\n".join(paragraphs) or nothing


def base_model(scores: list[dict], harm: list[float], slack: float = 0.01) -> str:
    """Notebook 00: bits per byte, and which layers nobody would miss."""
    lines = [f"On '{row['text']}' the model needs {row['bits_per_byte']:.3f} bits a byte "
             f"({row['low']:.3f} to {row['high']:.3f})." for row in scores]
    idle = [str(layer) for layer, value in enumerate(harm) if value < slack]
    verdict = f"No layer is slack (less than {slack} nats)."
    if idle:
        verdict = (f"Slack, adding less than {slack} nats: layers {', '.join(idle)}; a static plan "
                   "will find them, which flatters static plans.")
    lines.append(f"Skipping a single layer adds {min(harm):.3f} to {max(harm):.3f} nats a token, "
                 f"most at layer {harm.index(max(harm))}. {verdict}")
    return _text(lines)


def baselines(rows: list[dict]) -> str:
    """Notebook 01: what LoRA buys, and what stochastic depth costs with and without layers."""
    full = {kind_of(row): row["perplexity"] for row in rows if not row["skip"]}
    lines = [f"LoRA at full depth takes perplexity from {full['base']:.2f} to {full['dense']:.2f}, "
             "the ceiling of all that follows. Trained with layers missing it is "
             f"{full['stochastic']:.2f} at full depth, {_side(full['stochastic'], full['base'])} "
             "the untrained base."]
    dropped = [f"{row['perplexity']:.2f} at {_percent(row['skip'])}" for row in rows if row["skip"]]
    if dropped:
        lines.append(f"With layers dropped at random, whatever the token: {', '.join(dropped)} "
                     "measured skip.")
    return _text(lines)


def sequence(rows: list[dict]) -> str:
    """Notebook 02: where each price ended."""
    routed = [row for row in rows if kind_of(row) == "routed"]
    if not routed:
        return _text([])
    listed = ", ".join(f"{row['variant']} at {_percent(row['skip'])} "
                       f"(perplexity {row['perplexity']:.2f})" for row in routed)
    line = f"The skip ratio is a result of the price, not a setting: {listed}."
    skips = [row["skip"] for row in routed]
    if len(skips) > 1:
        always = skips == sorted(skips) and len(set(skips)) > 1
        line += (" A higher price skipped more each time." if always else
                 " A higher price did not always skip more.")
    return _text([line, "To reach a budget this way means training once for every price; the "
                        "controlled budget of notebook 03 chooses the price on held-out text "
                        "instead."])


# -- notebook 03 ------------------------------------------------------------------------------
def _by_router(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Router to its own row and its controls', by kind; without routers that have no controls."""
    routers = {row["variant"]: {"routed": row} for row in rows if kind_of(row) == "routed"}
    for row in rows:
        kind = kind_of(row)
        of = row.get("of") or row["variant"].removesuffix(f", {KINDS[kind]}")
        if kind in ("shuffled", "mean", "random") and of in routers:
            routers[of][kind] = row
    return {name: kinds for name, kinds in routers.items() if len(kinds) > 1}


def _beside_controls(name: str, kinds: dict[str, dict]) -> str:
    """A routed row beside the plans that are given the same weights and the same skip."""
    value = kinds["routed"]["perplexity"]
    words = {"shuffled": "plan shuffled", "mean": "mean plan", "random": "random plan"}
    others = {word: kinds[kind]["perplexity"] for kind, word in words.items() if kind in kinds}
    sides = [f"{_side(value, other)} its {word} ({other:.1f})" for word, other in others.items()]
    how = ", whose router was trained end to end," if name == "cold" else ""
    return f"**{name}**{how} at perplexity {value:.1f} is {', '.join(sides)}."


def token_routing(rows: list[dict], target: float, verdict: dict | None,
                  free: tuple = ("v1", "v2")) -> str:
    """Notebook 03: who landed on the target, and who beats plans that do not look at the token.

    `free` names the variants whose budget is a price: they have no target to meet.
    """
    routers = _by_router(rows)
    skips = {name: kinds["routed"]["skip"] for name, kinds in routers.items()}
    lines = []
    priced = [f"{_percent(skip)} ({name})" for name, skip in skips.items() if name in free]
    if priced:
        lines.append(f"Under a price alone the skip ratio ended at {', '.join(priced)}, of "
                     f"{_percent(target)} wished for.")
    missed = {name: abs(skip - target) for name, skip in skips.items() if name not in free}
    if missed:
        *others, last = missed
        names = f"{', '.join(others)} and {last}" if others else last
        lines.append(f"Calibrated on held-out text, {names} came within "
                     f"{100 * max(missed.values()):.1f} points of the target.")
    lines += [_beside_controls(name, kinds) for name, kinds in routers.items()]
    lines += [f"**{row['variant']}** is not causal: its plan has seen the tokens that it is scored "
              "on, so that no text can be generated so, and its perplexity is no prediction's."
              for row in rows if row.get("causal") is False]
    if verdict:
        lines.append(f"DLR is {against(verdict)} the best static plan: "
                     f"{verdict['nll_difference']:+.4f} nats a token ({verdict['low']:+.4f} to "
                     f"{verdict['high']:+.4f}, paired; negative favours DLR).")
    return _text(lines)


def depth_router(rows: list[dict], metrics: dict) -> str:
    """Notebook 09: who beats the best static plan before healing, and whether labels still help."""
    lines = []
    plans = dict.fromkeys(row["plan"] for row in rows)
    for plan in [plan for plan in plans if plan not in ("static", "oracle")]:
        own = [row for row in rows if row["plan"] == plan]
        sides = [against({"low": row["difference_low"], "high": row["difference_high"]})
                 for row in own]
        counted = ", ".join(f"{side} it at {sides.count(side)}" for side in dict.fromkeys(sides))
        shares = ", ".join(f"{_share(row['captured'])} at {row['budget']:.0%}" for row in own)
        lines.append(f"**{plan.capitalize()}** against the best static plan: {counted} of "
                     f"{len(own)} budgets; of the realised oracle's gain it captures {shares}.")
    scaling = pd.DataFrame(metrics["scaling"])
    for budget, part in scaling.groupby("budget") if len(scaling) else ():
        part = part.sort_values("labels")
        if len(part) > 1:
            first, last = part.iloc[0], part.iloc[-1]
            lines.append(f"At {budget:.0%}, from {first['labels']:,.0f} to {last['labels']:,.0f} "
                         f"labelled tokens the KL of the chosen plans goes from {first['kl']:.3f} "
                         f"to {last['kl']:.3f}.")
    return _text(lines)


# -- notebook 11 ---------------------------------------------------------------------------------
def predecessor(table: pd.DataFrame) -> str:
    """Notebook 11: each method's perplexity over dense LoRA's, least skip first."""
    if "to_dense" not in table:
        return _text([])
    skipping = table[table["skip"] > 0].dropna(subset=["to_dense"]).sort_values("skip")
    lines = [f"**{row.variant}** (seed {row.seed}) skips {_percent(row.skip)} of real tokens' "
             f"layers and {_percent(row.skip_padded)} of all positions', at {row.to_dense:.2f} "
             "times dense LoRA's perplexity."
             for row in skipping.itertuples() if row.kind in ("routed", "static", "stochastic")]
    return _text(lines)


# -- notebooks 04 to 06 -----------------------------------------------------------------------
def frontier(differences: pd.DataFrame) -> str:
    """Notebook 04: seed by seed, the router against the best static plan at each measured skip."""
    if not len(differences):
        return _text([], "No finished run compares a router with a static plan.")
    lines = ["Against the best static plan, with paired 95 % intervals:"]
    for _, runs in differences.groupby(differences["skip"].round(1)):
        mean = runs["nll_difference"].mean()
        sides = [against(row) for row in runs.to_dict("records")]
        counted = [f"{side} it in {sides.count(side)}" for side in dict.fromkeys(sides)]
        lines.append(f"At {_percent(runs['skip'].mean())} skip the router is {', '.join(counted)} "
                     f"of {len(runs)} seeds (mean {mean:+.4f} nats a token).")
    return _text(lines)


def evaluation(rows: list[dict], differences: list[dict]) -> str:
    """Notebook 05: the router against the static plan on the same items, and who is guessing."""
    lines = []
    for pair in differences:
        side = against(pair)
        lines.append(f"{pair['routed']} is {REVERSED.get(side, side)} {pair['static']} by "
                     f"{abs(pair['difference']):.4f} in mean accuracy over {pair['tasks']} tasks "
                     f"({pair['low']:+.4f} to {pair['high']:+.4f}, router minus static).")
    for task in dict.fromkeys(task for row in rows for task in row["perplexity"]):
        parts = [f"{row['variant']} {row['perplexity'][task]['token_perplexity']:.2f} at "
                 f"{_percent(row['skip'])} skip" for row in rows if task in row["perplexity"]]
        lines.append(f"Perplexity a token on {task}: {', '.join(parts)}.")
    for row in rows:
        guessed = [score["task"] for score in row["scores"] if score.get("above_chance") is False]
        if guessed:
            lines.append(f"{row['variant']} is not above chance on {', '.join(guessed)}, which "
                         "says nothing about routing.")
    return _text(lines + [_free_running(row) for row in rows if "against" in
                          row.get("agreement", {})])


def _free_running(row: dict) -> str:
    """A matched static plan's row beside the router's, router minus static: whose text strays."""
    measured, gap = row["agreement"], row["agreement"]["against"]
    name, ends = measured["match"], ("agreed_tokens_low", "agreed_tokens_high")
    side = against({"low": -gap[ends[1]], "high": -gap[ends[0]]})         # more tokens are better
    return (f"Running freely at {_percent(measured['skip'])} skip, {name} is {side} "
            f"{row['variant']}: of {measured['tokens']} greedy tokens {gap['agreed_tokens']:+.1f} "
            f"agree with the base's before the first that does not ({gap[ends[0]]:+.1f} to "
            f"{gap[ends[1]]:+.1f}, paired over {measured['prompts']} prompts), and KL is "
            f"{gap['kl']:+.3f} nats a token along the base's text ({gap['kl_low']:+.3f} to "
            f"{gap['kl_high']:+.3f}), {gap['kl_own_text']:+.3f} along their own.")


def latency(table: pd.DataFrame) -> str:
    """Notebook 06: what compact execution reached, and whether the reference ways save anything."""
    lines = []
    skipping = table[(table["part"] == "end to end") & (table["skip"] > 0)]
    for (work, batch, length), rows in skipping.groupby(["work", "batch", "length"], sort=False):
        parts = [f"{row.speedup:.2f} at {_percent(row.skip)} (bound {row.bound:.2f})"
                 for row in rows[rows["system"] == "compact"].itertuples()]
        line = (f"{work.capitalize()}, batch {batch}, {length} tokens: compact runs "
                f"{', '.join(parts)} times as fast as dense.")
        slow = rows.loc[rows["system"].isin(["masked", "two-pass"]), "speedup"]
        if len(slow):
            line += f" Masked and two-pass execution: {slow.min():.2f} to {slow.max():.2f}."
        whole = table[(table["system"] == "compiled") & (table["work"] == work)
                      & (table["batch"] == batch)]
        if len(whole):
            line += f" The dense model compiled whole: {whole['speedup'].iloc[0]:.2f}."
        lines.append(line)
    return _text(lines)


def token_analysis(metrics: dict, always_keep: int) -> str:
    """Notebook 07: whether the plan depends on the token, and how much headroom is captured."""
    gap = metrics["shuffled"]
    verdict = "Token-dependence is worth nothing that can be measured here"
    if gap["low"] > 0:
        verdict = "The plan depends on the token"
    first = (f"**{verdict}.** Shuffled among tokens it costs {gap['nll_difference']:+.4f} nats a "
             f"token (95 % interval {gap['low']:+.4f} to {gap['high']:+.4f}), that is perplexity "
             f"{gap['shuffled']:.2f} instead of {gap['routed']:.2f}.")
    shares = metrics["variance"]
    if shares["layers"] is not None:
        first += (f" Of the plan's variance {shares['layers']:.0%} lies between layers, as in a "
                  f"static plan, {shares['tokens']:.0%} in how many layers a token runs and "
                  f"{shares['within']:.0%} in which.")
    kinds = metrics["information"]["category"]
    token = metrics["between"]["token"]
    lines = [first, f"Categories explain {kinds['explained']:.1%} of the entropy of depth, after "
                    f"chance ({kinds['information']:.3f} bits, chance {kinds['chance']:.3f}); "
                    f"which token it is explains {_share(token)} of the variance of depth, the "
                    "rest is context."]
    lines += [f"Collapse: {flag}." for flag in metrics["collapse"]["flags"]]
    for row in metrics["rows"]:
        lines.append(f"At {row['skip']:.1%} skip ({row['weights']} weights) the oracle's KL is "
                     f"{row['oracle']:.3f}, the best static plan's {row['static']:.3f}, the "
                     f"router's {row['routed']:.3f}: it captures **{_share(row['captured'])}** of "
                     f"the headroom (95 % interval {_share(row['captured_low'])} to "
                     f"{_share(row['captured_high'])}).")
    probes = [row for row in metrics["probes"] if row["depth"] == always_keep]
    if probes:
        explained = " and ".join(f"{_share(row['r2'])} ({row['probe']})" for row in probes)
        lines.append("Of the variance of a layer's harm on the base model (clipped at its 1st and "
                     f"99th percentile), probes explain from the state after layer {always_keep}, "
                     f"where the router reads, {explained}, on documents held out (mean of layers, "
                     f"{probes[0]['tokens']:,} tokens).")
    return _text(lines)


def _share(value: float | None) -> str:
    return "an unknown share" if value is None or value != value else f"{value:.0%}"
