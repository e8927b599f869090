"""The sections of the report: which tables, figures and sentences stand in each."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from markupsafe import Markup

from dlr.workbook.report import commands, measures, predecessor, tables
from dlr.workbook.report.pictures import Picture, replaced
from dlr.workbook.report.sources import Missing, Results
from dlr.workbook.report.tables import Table, headed

Tables = Iterator[Callable[[], Table]]


class Section(NamedTuple):
    """A section's name (of its prose and its claims), its title, its tables and its figures.

    Attributes:
        phase: whose registered figures stand here, those that `shows` by name.
    """
    name: str
    title: str
    tables: Callable[[Results], Tables] | None = None
    phase: str = ""
    shows: Callable[[str], bool] = lambda name: True


def _runs(results: Results, phase: str) -> list[str]:
    """Runs of a phase. Raises Missing: there is none."""
    runs = results.runs(phase)
    if not runs:
        raise Missing(f"{phase}/default", "finished run")
    return runs


def _groups(results: Results, is_embedded: bool) -> list[tuple[tuple, list[str]]]:
    groups = list(tables.routed_groups(results, is_embedded).items())
    if not groups:
        raise Missing("pareto/router-seed=0" if is_embedded else "pareto/smollm2-router",
                      "finished run")
    return groups


def _frontiers(results: Results, is_embedded: bool) -> Tables:
    for (model, dataset, steps), runs in _groups(results, is_embedded):
        name = f"frontier-{headed(f'{model}-{dataset}-{steps}')}"
        caption = Markup("{} on {}, {} steps: perplexity, mean ± SD over seeds. Differences "
                         "in nats a token, with paired 95 % intervals over documents, a line a "
                         "seed.").format(
            results.setting(runs[0], "model"), results.setting(runs[0], "dataset"),
            results.setting(runs[0], "steps"))
        yield lambda runs=runs, name=name, caption=caption: tables.frontier(
            results, runs, name, caption)


def _frontier(results: Results) -> Tables:
    yield from _frontiers(results, True)


def _pretrained(results: Results) -> Tables:
    yield from _frontiers(results, False)
    for run in results.runs("pareto"):
        if results.at((f"{run}/metrics.json", ())).get("domains"):
            yield lambda run=run: tables.domains(
                results, run, f"domains-{headed(run)}",
                "The router less the best static plan by domain, nats a token.")
        elif not any(row.get("kind") == "routed" for row in results.rows(run)):
            yield lambda run=run: tables.perplexities(
                results, run, f"rows-{headed(run)}", Markup("LoRA at full depth and stochastic "
                "depth, {} on {}, {} steps.").format(*(results.setting(run, key) for key in
                                                      ("model", "dataset", "steps"))))


def _rows(phase: str, caption: str):
    def made(results: Results) -> Tables:
        for run in _runs(results, phase):
            yield lambda run=run: tables.perplexities(results, run, headed(run), caption)
    return made


def _versions(results: Results) -> Tables:
    for run in _runs(results, "token_routing"):
        yield lambda run=run: tables.versions(
            results, run, headed(run), "Versions of the router, all trained for the same steps; "
            "their controls run on their weights at their skip. After the semicolon: loss less the "
            "router's, nats a token, paired 95 % interval.")


def _stages(results: Results) -> Tables:
    for run in _runs(results, "stages"):
        yield lambda run=run: tables.stages(
            results, run, headed(run), "Loss of each stage less that of the stage that it "
            "follows, or in whose place it stands, nats a token; negative helps.")


def _harm(results: Results) -> Tables:
    runs = _runs(results, "depth_router")
    ranked = [run for run in runs if "skip_adapter_rank=" in run]
    for run in [run for run in runs if run not in ranked]:
        yield lambda run=run: measures.harm(
            results, run, headed(run), "KL from the dense model by plan and skip, nats a token, "
            "with 95 % intervals over documents; nothing is healed.")
        yield lambda run=run: measures.scaling(
            results, run, f"{headed(run)}-labels",
            "KL of the chosen plans by number of labelled tokens and skip.")
    if ranked:
        budget = measures.budgets_of(results, ranked[0])[1]
        number = measures.budget_number(results, ranked[0], budget)
        yield lambda: measures.ranks(
            results, ranked, "adapter-ranks", Markup("What a rank of skip adapters buys on {}, at "
            "{}\u00a0% skip: KL from the dense model, nats a token.").format(
                results.setting(ranked[0], "model"), number), budget)


def _tokens(results: Results) -> Tables:
    for run in _runs(results, "token_analysis"):
        yield lambda run=run: measures.headroom(
            results, run, f"{headed(run)}-headroom", "KL from the dense model of static plan, "
            "router and greedy oracle, and what the router captures of the oracle's gain.")
        yield lambda run=run: measures.categories(
            results, run, f"{headed(run)}-categories", "Depth by category of the token read.")
        yield lambda run=run: measures.probes(
            results, run, f"{headed(run)}-probes", "How much of the harm of skipping single "
            "layers a probe of the base model's state explains on documents held out.")


def _benchmarks(results: Results) -> Tables:
    for run in _runs(results, "evaluation"):
        yield lambda run=run: measures.scores(
            results, run, headed(run), Markup("Scores of <code>{}</code>, with the skip measured "
                                              "on the tokens scored.").format(run))


def _latency(results: Results) -> Tables:
    for run in _runs(results, "latency"):
        yield lambda run=run: measures.speed(
            results, run, headed(run), Markup("<code>{}</code>: how many times as fast as dense, "
            "end to end; medians of systems that take turns.").format(run))


def _setup(results: Results) -> Tables:
    runs = commands.recorded(results)
    for run in results.runs("base_model"):
        if len(results.rows(run)) > 1:
            yield lambda run=run: measures.base_scores(
                results, run, headed(run), "The embedded base model, on three texts.")
    yield lambda: commands.setup(results, runs)
    yield lambda: commands.surroundings(results, runs)


def _repeat(results: Results) -> Tables:
    yield lambda: commands.repeating(results, commands.recorded(results))


def _beside(results: Results) -> Tables:
    yield lambda: predecessor.ours(results)
    for model in predecessor.MODELS:
        yield lambda model=model: predecessor.published(results, model)
    yield lambda: predecessor.larger(results)


def figures_table(drawn: list[Picture]) -> Table:
    """The predecessor's figures, and ours in the place of each."""
    lines = [[Markup("<code>{}</code>").format(file), shows,
              Markup(", ").join(Markup("<code>{}</code>").format(name) for name in ours)
              or "not drawn from these results"]
             for file, shows, ours in replaced(drawn)]
    return Table("figures", "The predecessor's figures, and ours in the place of each.",
                 ["its figure", "shows", "ours"], lines, [])


SECTIONS = [
    Section("question", "Question"),
    Section("method", "Method"),
    Section("setup", "Experimental setup", _setup, "base_model"),
    Section("frontier", "The frontier", _frontier, "pareto",
            lambda name: "smollm2" not in name),
    Section("domains", "A pretrained model", _pretrained, "pareto",
            lambda name: "smollm2" in name),
    Section("versions", "Versions of the router", _versions, "token_routing"),
    Section("baselines", "Without a router", _rows("baselines", "LoRA at full depth, and "
            "stochastic depth with and without layers."), "baselines"),
    Section("sequence", "One plan a sequence", _rows("sequence_routing", "A router that gives a "
            "whole sequence one plan, under three prices."), "sequence_routing"),
    Section("stages", "Stage by stage", _stages, "stages"),
    Section("harm", "Before healing", _harm, "depth_router"),
    Section("tokens", "What the router knows", _tokens, "token_analysis"),
    Section("benchmarks", "Benchmarks", _benchmarks, "evaluation"),
    Section("latency", "Is time saved?", _latency, "latency"),
    Section("verdict", "What holds and what does not"),
    Section("predecessor", "Beside the predecessor", _beside, "predecessor"),
    Section("figures", "Its figures and ours"),
    Section("limits", "Limits"),
    Section("repeat", "How to repeat each number", _repeat),
    Section("citations", "Methods used"),
]
