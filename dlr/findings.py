"""What a run found, in sentences computed from its rows, so that a notebook's last words agree with its table."""

import pandas as pd


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["variant"]: row for row in rows}


def _side(value: float, other: float, better: str = "better than", worse: str = "worse than") -> str:
    """Lower is better, as for perplexities; equal to two decimals is as good."""
    return "as good as" if round(value, 2) == round(other, 2) else better if value < other else worse


def _said(lines: list[str], nothing: str = "No row of this run says more than the table.") -> str:
    return "\n\n".join(line for line in lines if line) or nothing


def base_model(scores: list[dict], harm: list[float], slack: float = 0.01) -> str:
    """Notebook 00: bits per byte, and which layers nobody would miss."""
    lines = [f"On '{row['text']}' the model needs {row['bits_per_byte']:.3f} bits a byte "
             f"({row['low']:.3f} to {row['high']:.3f})." for row in scores]
    idle = [str(layer) for layer, value in enumerate(harm) if value < slack]
    least, most = min(harm), max(harm)
    lines.append(f"Skipping a single layer adds {least:.3f} to {most:.3f} nats a token, most at layer "
                 f"{harm.index(most)}. "
                 + (f"Slack, adding less than {slack} nats: layers {', '.join(idle)}; a static plan will find them, "
                    "which flatters static plans." if idle else f"No layer is slack (less than {slack} nats)."))
    return _said(lines)


def baselines(rows: list[dict]) -> str:
    """Notebook 01: what LoRA buys, and what stochastic depth costs with and without layers."""
    named = _by_name(rows)
    base, dense, full = (named[name]["perplexity"] for name in ("base", "dense LoRA", "stochastic depth, full"))
    lines = [f"LoRA at full depth takes perplexity from {base:.2f} to {dense:.2f}, the ceiling of all that follows. "
             f"Trained with layers missing it is {full:.2f} at full depth, {_side(full, base)} the untrained base."]
    dropped = [f"{row['perplexity']:.2f} at {_percent(row['skip'])}" for name, row in named.items() if "dropped" in name]
    if dropped:
        lines.append(f"With layers dropped at random, whatever the token: {', '.join(dropped)} measured skip.")
    return _said(lines)


def sequence(rows: list[dict]) -> str:
    """Notebook 02: where each price ended."""
    ends = [row for row in rows if row["variant"].startswith("lambda")]
    if not ends:
        return _said([])
    listed = ", ".join(f"{row['variant']} at {_percent(row['skip'])} (perplexity {row['perplexity']:.2f})"
                       for row in ends)
    skips = [row["skip"] for row in ends]
    line = f"The skip ratio is a result of the price, not a setting: {listed}."
    if len(ends) > 1:
        line += (" A higher price skipped more each time." if skips == sorted(skips) and len(set(skips)) > 1 else
                 " A higher price did not always skip more.")
    return _said([line, "To reach a budget this way means training once for every price; the controlled budget of "
                        "notebook 03 chooses the price on held-out text instead."])


def token_routing(rows: list[dict], target: float, verdict: dict | None, free: tuple = ("v1", "v2")) -> str:
    """Notebook 03: who landed on the target, who beats plans that do not look at the token, and by how much.

    `free` names the variants whose budget is a price: they have no target to meet.
    """
    named = _by_name(rows)
    routed = [name for name in named if f"{name}, shuffled" in named]
    ends = {name: named[name]["skip"] for name in routed}
    lines = []
    if any(name in free for name in routed):
        lines.append("Under a price alone the skip ratio ended at "
                     + ", ".join(f"{_percent(ends[name])} ({name})" for name in routed if name in free)
                     + f", of {_percent(target)} wished for.")
    controlled = [name for name in routed if name not in free]
    if controlled:
        worst = max(abs(ends[name] - target) for name in controlled)
        lines.append(f"Calibrated on held-out text, {_listed(controlled)} came within {100 * worst:.1f} points of the "
                     "target.")
    lines += [_beside_controls(name, named) for name in routed]
    if verdict:
        lines.append(f"DLR is {against(verdict)} the best static plan: {verdict['nll_difference']:+.4f} nats a token "
                     f"({verdict['low']:+.4f} to {verdict['high']:+.4f}, paired; negative favours DLR).")
    return _said(lines)


def _beside_controls(name: str, named: dict[str, dict]) -> str:
    """A routed row beside the plans that are given the same weights and the same skip."""
    own, parts = named[name]["perplexity"], []
    for control, kind in ((f"{name}, {kind}", kind) for kind in ("shuffled", "mean plan", "random plan")):
        if control in named:
            other = named[control]["perplexity"]
            parts.append(f"{_side(own, other)} its {'plan shuffled' if kind == 'shuffled' else kind} ({other:.1f})")
    how = ", whose router was trained end to end," if name == "cold" else ""
    return f"**{name}**{how} at perplexity {own:.1f} is " + ", ".join(parts) + "."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def against(interval: dict) -> str:
    """Where an interval of differences lies (lower is better): better than, worse than, not distinguishable from."""
    if interval["high"] < 0:
        return "better than"
    return "worse than" if interval["low"] > 0 else "not distinguishable from"


def frontier(differences: pd.DataFrame) -> str:
    """Notebook 04: seed by seed, the router against the best static plan at each measured skip."""
    lines = []
    for skip, runs in differences.groupby(differences["skip"].round(1)) if len(differences) else ():
        sides = [against(row) for row in runs.to_dict("records")]
        counted = [f"{side} it in {sides.count(side)}" for side in dict.fromkeys(sides)]
        lines.append(f"At {_percent(runs['skip'].mean())} skip the router is {', '.join(counted)} of {len(runs)} seeds "
                     f"(mean {runs['nll_difference'].mean():+.4f} nats a token).")
    return _said(["Against the best static plan, with paired 95 % intervals:"] * bool(lines) + lines,
                 "No finished run compares a router with a static plan.")


def evaluation(rows: list[dict], differences: list[dict]) -> str:
    """Notebook 05: the router against the static plan on the same items, and where a model of this size is guessing."""
    lines = []
    for found in differences:
        side = {"better than": "worse than", "worse than": "better than"}.get(against(found), against(found))
        lines.append(f"{found['routed']} is {side} {found['static']} by {abs(found['difference']):.4f} in mean accuracy "
                     f"over {found['tasks']} tasks ({found['low']:+.4f} to {found['high']:+.4f}, router minus static).")
    for task in dict.fromkeys(task for row in rows for task in row["perplexity"]):
        parts = [f"{row['variant']} {row['perplexity'][task]['token_perplexity']:.2f} at {_percent(row['skip'])} skip"
                 for row in rows if task in row["perplexity"]]
        lines.append(f"Perplexity a token on {task}: {', '.join(parts)}.")
    guessing = {row["variant"]: [s["task"] for s in row["scores"] if s.get("above_chance") is False] for row in rows}
    lines += [f"{name} is not above chance on {', '.join(tasks)}, which says nothing about routing."
              for name, tasks in guessing.items() if tasks]
    return _said(lines)


def latency(table: pd.DataFrame) -> str:
    """Notebook 06: what compact execution reached, and whether the reference ways save anything."""
    lines, whole = [], table[table["part"] == "end to end"]
    for (work, batch, length), rows in whole.groupby(["work", "batch", "length"], sort=False):
        fast = rows[(rows["system"] == "compact") & (rows["skip"] > 0)]
        parts = [f"{row.speedup:.2f} at {_percent(row.skip)} (bound {row.bound:.2f})" for row in fast.itertuples()]
        slow = rows[rows["system"].isin(["masked", "two-pass"]) & (rows["skip"] > 0)]
        line = (f"{work.capitalize()}, batch {batch}, {length} tokens: compact runs {', '.join(parts)} times as fast as "
                "dense.")
        if len(slow):
            line += f" Masked and two-pass execution: {slow['speedup'].min():.2f} to {slow['speedup'].max():.2f}."
        lines.append(line)
    return _said(lines)
