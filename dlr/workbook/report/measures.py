"""Tables of what was measured without training: harm, headroom, benchmarks, speed, the base."""

from markupsafe import Markup

from dlr.runs import METRICS
from dlr.workbook.report.sources import Number, Results
from dlr.workbook.report.tables import BLANK, Table, percent
from dlr.workbook.report.verdicts import Interval, interval


def base_scores(results: Results, run: str, name: str, caption: str) -> Table:
    """Bits a byte of the embedded model, by text."""
    lines = []
    for place, _ in enumerate(results.rows(run)):
        steps = "rows", place
        lines.append([results.metric(run, *steps, "text"),
                      interval(results, run, *steps, names=("bits_per_byte", "low", "high"),
                               shape=".3f"),
                      results.metric(run, *steps, "perplexity"),
                      results.metric(run, *steps, "tokens", shape=",")])
    columns = ["text", "bits a byte (95 % interval)", "perplexity a token", "tokens"]
    return Table(name, caption, columns, lines, [run])


# -- before healing -------------------------------------------------------------------------------
def budgets_of(results: Results, run: str) -> list[float]:
    return sorted({row["budget"] for row in results.rows(run)})


def budget_number(results: Results, run: str, budget: float) -> Number:
    """A budget in whole per cent, as the first row that has it records it."""
    place = next(i for i, row in enumerate(results.rows(run)) if row["budget"] == budget)
    return results.percent(run, "rows", place, "budget", shape=".0f")


def plan_difference(results: Results, run: str, plan: str, budget: float) -> Interval:
    """KL of a plan less the static one's."""
    return interval(results, run, "rows", {"plan": plan, "budget": budget}, shape="+.3f",
                    names=("difference", "difference_low", "difference_high"))


def harm(results: Results, run: str, name: str, caption: str) -> Table:
    """KL from the dense model by plan and budget, with intervals, and the share captured."""
    budgets = budgets_of(results, run)
    lines = []
    for plan in dict.fromkeys(row["plan"] for row in results.rows(run)):
        steps = [("rows", {"plan": plan, "budget": budget}) for budget in budgets]
        lines.append([results.metric(run, *steps[0], "plan"),
                      *(interval(results, run, *step, names=("kl", "low", "high"), shape=".3f")
                        for step in steps)])
    caught = [results.percent(run, "rows", {"plan": "depth router", "budget": budget}, "captured",
                              shape=".0f") for budget in budgets]
    lines.append(["captured by the depth router", *map(percent, caught)])
    columns = [percent(budget_number(results, run, budget)) for budget in budgets]
    return Table(name, caption, ["plan", *columns], lines, [run])


def scaling(results: Results, run: str, name: str, caption: str) -> Table:
    """KL of the chosen plans by number of labelled tokens and budget."""
    rows = results.rows(run, "scaling")
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for count in sorted({row["labels"] for row in rows}):
        steps = [("scaling", {"labels": count, "budget": budget}) for budget in budgets]
        lines.append([results.metric(run, *steps[0], "labels", shape=","),
                      *(results.metric(run, *step, "kl", shape=".3f") for step in steps)])
    columns = [percent(budget_number(results, run, budget)) for budget in budgets]
    return Table(name, caption, ["labelled tokens", *columns], lines, [run])


def ranks(results: Results, runs: list[str], name: str, caption: str, budget: float) -> Table:
    """What a rank of skip adapters buys: KL of static plan and router at one budget."""
    runs = sorted(runs, key=lambda run: results.setting(run, "skip_adapter_rank").value)
    lines = []
    for run in runs:
        own = [interval(results, run, "rows", {"plan": plan, "budget": budget},
                        names=("kl", "low", "high"), shape=".3f")
               for plan in ("static", "depth router")]
        lines.append([results.setting(run, "skip_adapter_rank"), *own,
                      plan_difference(results, run, "depth router", budget),
                      percent(results.percent(run, "rows", {"plan": "depth router",
                                                            "budget": budget}, "captured",
                                              shape=".0f"))])
    columns = ["rank", "static", "depth router", "depth router − static", "captured"]
    return Table(name, caption, columns, lines, runs)


# -- what the router knows ------------------------------------------------------------------------
def headroom(results: Results, run: str, name: str, caption: str) -> Table:
    """KL of static plan, router and oracle, and the headroom that the router captures."""
    lines = []
    for place, _ in enumerate(results.rows(run)):
        steps = "rows", place
        low, middle, high = (results.percent(run, *steps, key, shape=".0f")
                             for key in ("captured_low", "captured", "captured_high"))
        lines.append([results.metric(run, *steps, "weights"),
                      percent(results.percent(run, *steps, "skip")),
                      *(results.metric(run, *steps, key, shape=".3f")
                        for key in ("static", "routed", "oracle")),
                      percent(Interval(middle, low, high))])
    columns = ["weights", "skip", "static", "router", "oracle", "captured (95 % interval)"]
    return Table(name, caption, columns, lines, [run])


def categories(results: Results, run: str, name: str, caption: str) -> Table:
    """Depth and loss by category of the token read, deepest last."""
    rows = [row for row in results.rows(run, "categories") if row["tokens"]]
    lines = []
    for row in sorted(rows, key=lambda row: row["active_layers"]):
        steps = "categories", {"category": row["category"]}
        lines.append([results.metric(run, *steps, "category"),
                      results.metric(run, *steps, "tokens", shape=","),
                      interval(results, run, *steps, names=("active_layers", "low", "high"),
                               shape=".2f"),
                      *(results.metric(run, *steps, key, shape=".3f")
                        for key in ("loss_dense", "loss_routed"))])
    columns = ["category", "tokens", "active layers (95 % interval)", "loss, dense", "loss, routed"]
    return Table(name, caption, columns, lines, [run])


def probes(results: Results, run: str, name: str, caption: str) -> Table:
    """How much of the harm of single layers a probe explains, by the depth that it reads."""
    lines = []
    for place, _ in enumerate(results.rows(run, "probes")):
        steps = "probes", place
        low, middle, high = (results.percent(run, *steps, key)
                             for key in ("r2_low", "r2", "r2_high"))
        lines.append([results.metric(run, *steps, "depth", shape="d"),
                      results.metric(run, *steps, "probe"),
                      percent(Interval(middle, low, high)),
                      results.metric(run, *steps, "tokens", shape=",")])
    columns = ["state after layer", "probe", "variance explained (95 % interval)", "tokens"]
    return Table(name, caption, columns, lines, [run])


# -- benchmarks -----------------------------------------------------------------------------------
def scores(results: Results, run: str, name: str, caption: str) -> Table:
    """Every variant on every task: score with its standard error, chance, measured skip."""
    lines = []
    for place, row in enumerate(results.rows(run)):
        own = "rows", place
        variant = results.metric(run, *own, "variant")
        for task in range(len(row["scores"])):
            steps = (*own, "scores", task)
            error = results.metric(run, *steps, "stderr", shape=".3f")
            score = results.metric(run, *steps, "score", shape=".3f")
            lines.append([variant, results.metric(run, *steps, "task"),
                          score if error.value is None else Markup("{} ± {}").format(score, error),
                          results.metric(run, *steps, "chance", shape=".3f"),
                          percent(results.percent(run, *steps, "skip"))])
        for task in row["perplexity"]:
            names = [f"token_perplexity{end}" for end in ("", "_low", "_high")]
            lines.append([variant, Markup("{}, perplexity").format(task),
                          interval(results, run, *own, "perplexity", task, names=names,
                                   shape=".2f"),
                          BLANK, percent(results.percent(run, *own, "skip"))])
    columns = ["variant", "task", "score ± standard error, or 95 % interval", "chance",
               "measured skip"]
    return Table(name, caption, columns, lines, [run])


# -- speed ----------------------------------------------------------------------------------------
SYSTEMS = ("truncation", "compact", "masked", "two-pass")


def speed_cases(results: Results, run: str) -> list[dict]:
    """Work, batch, length and skip of everything timed end to end with some of it skipped."""
    names = "work", "batch", "length", "skip"
    cases = [tuple(row[name] for name in names) for row in results.rows(run)
             if row["part"] == "end to end" and row["skip"] > 0]
    return [dict(zip(names, case)) for case in dict.fromkeys(cases)]


def timed(results: Results, run: str, case: dict, system: str, name: str = "speedup"):
    """A number of one system in one case, or a dash where it was not timed."""
    row = case | {"system": system, "part": "end to end"}
    fits = [each for each in results.read(f"{run}/{METRICS}")["rows"]
            if row.items() <= each.items()]
    return results.metric(run, "rows", row, name) if fits else BLANK


def speed(results: Results, run: str, name: str, caption: str) -> Table:
    """End-to-end speed over dense, beside the layer-count bound, a line a case."""
    lines = []
    for case in speed_cases(results, run):
        cells = [timed(results, run, case, "compact", key) for key in ("work", "batch", "length")]
        for cell in cells[1:]:
            cell.shape = ","
        ratios = [timed(results, run, case, system) for system in SYSTEMS]
        row = case | {"system": "compact", "part": "end to end"}
        if "speedup_q1" in next(each for each in results.rows(run)
                                if row.items() <= each.items()):
            ratios[1] = interval(results, run, "rows", row, shape=".2f",
                                 names=("speedup", "speedup_q1", "speedup_q3"))
        skip = results.percent(run, "rows", row, "skip", shape=".0f")
        lines.append([*cells, percent(skip), timed(results, run, case, "compact", "bound"),
                      *ratios])
    columns = ["work", "batch", "tokens", "skip", "layer-count bound", "truncation",
               "compact (quartiles)", "masked", "two-pass"]
    return Table(name, caption, columns, lines, [run])
