"""Numbers in the texts are those of results/: each sentence is built from files and looked for."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from dlr.measure.record import Record
from dlr.runs import project_root

ROOT = project_root()


def plain(text: str) -> str:
    """Without emphasis and line breaks, so that a sentence is found wherever it is broken."""
    return " ".join(text.replace("**", "").replace("−", "-").split())


PAGES = " ".join(plain((ROOT / page).read_text(encoding="utf-8"))
                 for page in ("README.md", "results/README.md"))


def metrics(run: str) -> dict:
    return json.loads((ROOT / "results" / run / "metrics.json").read_text(encoding="utf-8"))


def rows(run: str) -> dict[str, dict]:
    return {row["variant"]: row for row in metrics(run)["rows"]}


def says(*sentences: str, text: str = PAGES) -> None:
    missing = [sentence for sentence in map(plain, sentences) if sentence not in text]
    assert not missing, missing


NUMBERS = {2: "two", 3: "three"}


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6])
def test_the_frontier(target):
    runs = sorted(f"pareto/{path.name}" for path in (ROOT / "results/pareto").glob("router-seed=*"))
    says(f"mean ± SD over {NUMBERS[len(runs)]} seeds")
    dlr, static = f"DLR at {target:.0%}", f"best static at {target:.0%}"
    each = {name: [rows(run)[name]["perplexity"] for run in runs] for name in rows(runs[0])}
    skips = [100 * rows(run)[dlr]["skip"] for run in runs]
    against = [next(row for row in metrics(run)["against_static"] if row["target_skip"] == target)
               for run in runs]
    differences = "; ".join(
        f"{d['nll_difference']:+.4f} ({d['low']:.4f}, {d['high']:.4f})" for d in against)
    says(f"| {100 * target:.0f} % | {np.mean(skips):.1f} ± {np.std(skips, ddof=1):.1f} % | "
         f"{spread(each[dlr])} | "
         f"{spread(each[static])} | {np.mean(each[f'{dlr}, mean plan']):.2f} | "
         f"{np.mean(each[f'{dlr}, shuffled']):.2f} | "
         f"{np.mean(each[f'{dlr}, random plan']):.2f} | {differences} |")
    assert all(abs(skip - 100 * target) < 1 for skip in skips)
    assert all(shuffled > own for shuffled, own in zip(each[f"{dlr}, shuffled"], each[dlr]))
    assert all(d["high"] < 0 for d in against), "the router wins in every cell"


def test_what_stands_beside_the_frontier():
    beside = rows("baselines/default")
    dropped = [beside[f"stochastic depth, {name}"]["perplexity"]
               for name in ("full", "20% dropped", "40% dropped", "60% dropped")]
    says(f"base {beside['base']['perplexity']:.2f}, dense LoRA "
         f"{beside['dense LoRA']['perplexity']:.2f}",
         f"{dropped[0]:.2f} at full depth, {dropped[1]:.2f}, {dropped[2]:.2f} and "
         f"{dropped[3]:.2f} with 20, 40 and 60 % dropped")


def test_the_versions_of_notebook_03():
    found = rows("token_routing/default")
    for name in ("v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"):
        cells = [f"{found[name]['perplexity']:.2f}"] + [
            f"{found[other]['perplexity']:.2f}" if other in found else "–" for other in
            (f"{name}, shuffled", f"{name}, mean plan", f"{name}, random plan")]
        says(f"| {name} | {100 * found[name]['skip']:.1f} % | {' | '.join(cells)} |")
    against = metrics("token_routing/default")["against_static"]
    says(f"{against['nll_difference']:+.4f} ({against['low']:.4f}, {against['high']:.4f}) nats a token")


def test_what_is_measured_before_healing():
    found = metrics("depth_router/default")
    of = {(row["plan"], row["budget"]): row for row in found["rows"]}
    budgets = sorted({budget for _, budget in of})
    for plan in dict.fromkeys(plan for plan, _ in of):
        cells = [f"{of[plan, budget]['kl']:.3f}" for budget in budgets]
        says(f"| {plan} | {' | '.join(cells)} |")
    *first, last = (f"{100 * of['depth router', budget]['captured']:.0f}" for budget in budgets)
    says(f"captures {', '.join(first)} and {last} % of what the oracle gains")
    below = [of[plan, budget]["difference_high"] < 0 for plan in ("depth router", "token alone")
             for budget in budgets]
    assert all(below), "what is said to be below the static plan"
    forty = [row for row in found["scaling"] if row["budget"] == 0.4]
    says(f"from {forty[0]['kl']:.3f} with {forty[0]['labels']:,} labelled tokens to "
         f"{forty[-1]['kl']:.3f} with {forty[-1]['labels']:,}")
    assert all(more["kl"] < less["kl"] for less, more in zip(forty, forty[1:])), "still falling"


def test_what_each_stage_adds():
    found = {(row["stage"], row["target_skip"]): row for row in metrics("stages/default")["gains"]}
    for stage, words in (("regressed", "regressed, after the closed form"),
                         ("in context", "in context"), ("healed", "healed"),
                         ("end to end", "end to end, in the place of healed")):
        rows_of = [found[stage, budget] for budget in (0.2, 0.4, 0.6)]
        cells = [f"{row['nll_difference']:+.4f} ({row['low']:.4f}, {row['high']:.4f})"
                 for row in rows_of]
        says(f"| {words} | {' | '.join(cells)} |")
        helps = [row["high"] < 0 for row in rows_of]
        assert all(helps) == any(helps) == (stage in ("regressed", "healed")), stage
        assert stage != "end to end" or all(row["low"] > 0 for row in rows_of)


def test_the_router_for_smollm2():
    found, table = metrics("pareto/smollm2-router"), rows("pareto/smollm2-router")
    base = table["base"]["perplexity"]
    says(f"over the untouched base ({base:.2f})", f"{table['base']['documents']} test documents of "
         f"them ({table['base']['predicted_tokens']:,} tokens;")
    for asked in (0.15, 0.25, 0.4, 0.5):
        row = table[f"DLR at {asked:.0%}"]
        against = [table[f"DLR at {asked:.0%}, {control}"]["against_router"]
                   for control in ("shuffled", "mean plan")]
        cells = [f"{a['nll_difference']:.3f} ({a['low']:.3f}, {a['high']:.3f})" for a in against]
        says(f"| {100 * asked:.0f} % | {100 * row['skip']:.1f} % | {row['perplexity']:.2f} | "
             f"{row['perplexity'] / base:.3f} | {cells[0]} | {cells[1]} |")
        assert against[0]["low"] > 0.05 and against[1]["low"] > 0
    missed = max(abs(row["asked"] - row["skip"]) for row in found["dial"])
    says(f"skips up to {100 * missed:.1f} points less than it is asked to")


def test_a_healed_pair_on_smollm2():
    run = "pareto/smollm2-mixture-steps=40-router-seed=0"
    found, table = metrics(run), rows(run)
    says(f"six a domain ({table['DLR at 25%']['predicted_tokens']:,} tokens")
    for row in found["against_static"]:
        at = f"at {row['target_skip']:.0%}"
        each = [table[name]["perplexity"] for name in
                (f"DLR {at}", f"best static {at}", f"DLR {at}, mean plan", f"DLR {at}, shuffled")]
        says(f"| {100 * row['target_skip']:.0f} % | {100 * row['skip']:.1f} % | "
             + " | ".join(f"{value:.2f}" for value in each)
             + f" | {row['nll_difference']:+.3f} ({row['low']:.3f}, {row['high']:.3f}) |")
        assert row["high"] < 0, "below the static plan at every budget"
    gains = [f"{-row['nll_difference']:.2f}" for row in found["against_static"]]
    says(f"five domains of text, by {', '.join(gains[:3])} and {gains[3]} nats")
    assert any(row["low"] > 0 for row in found["domains"]), "not in every domain"
    for domain in {row["domain"] for row in found["domains"]}:
        cells = [f"{row['nll_difference']:+.3f} ({row['low']:.3f}, {row['high']:.3f})"
                 for row in found["domains"] if row["domain"] == domain]
        says(f"| {domain} | {' | '.join(cells)} |")


def test_smollm2_and_its_adapters():
    found = {rank: metrics(f"depth_router/smollm2-skip_adapter_rank={rank}")
             for rank in (0, 8, 16, 32, 64, 128)}
    at = {rank: {(row["plan"], row["budget"]): row for row in run["rows"]}
          for rank, run in found.items()}

    def kl(plan: str) -> list[str]:
        return [f"{rows[plan, 0.25]['kl']:.3f}" for rows in at.values()]
    none, *ranks = kl("static")
    says(f"is {none} without adapters and {', '.join(ranks[:-1])} and {ranks[-1]} with rank 8, 16, "
         "32, 64 and 128")
    none, *ranks = kl("depth router")
    says(f"router's is {none}, and {', '.join(ranks[:-1])} and {ranks[-1]}",
         f"{found[64]['labels']:,} labelled tokens a point",
         f"{at[64]['static', 0.25]['tokens']:,} tokens of {at[64]['static', 0.25]['documents']} test")
    captured = {plan: f"{100 * at[64][plan, 0.25]['captured']:.0f} %"
                for plan in ("depth router", "privileged", "token alone")}
    says(f"captures {captured['depth router']} of what the oracle gains at 25 %, a privileged one "
         f"{captured['privileged']}, and a table by token id {captured['token alone']}")
    below = {rank: all(rows["depth router", budget]["difference_high"] < 0
                       for _, budget in rows) for rank, rows in at.items()}
    assert [rank for rank, wins in below.items() if not wins] == [8, 16]
    layer = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    says(f"an adapter has {100 * (2 * 64 * 576 + 64) / layer:.1f} % of the weights of the layer")
    beside = rows("pareto/smollm2-baselines-seed=0")
    dropped = [beside[f"stochastic depth, {name}"]["perplexity"] for name in
               ("full", "15% dropped", "25% dropped", "40% dropped", "50% dropped")]
    says(f"base {beside['base']['perplexity']:.2f}, dense LoRA "
         f"{beside['dense LoRA']['perplexity']:.2f}; stochastic depth {dropped[0]:.2f} at full "
         f"depth, {', '.join(f'{value:.2f}' for value in dropped[1:-1])} and {dropped[-1]:.2f} "
         "with 15, 25, 40 and 50 % dropped")


def test_smollm2_with_many_labels():
    found = metrics("depth_router/smollm2")
    at = {(row["plan"], row["budget"]): row for row in found["rows"]}

    def listed(values: list[str]) -> str:
        return f"{', '.join(values[:-1])} and {values[-1]}"

    def each(plan: str, form) -> str:
        return listed([form(at[plan, budget]) for budget in (0.15, 0.25, 0.4, 0.5, 0.6)])
    assert all(row["difference_high"] < 0 for (plan, _), row in at.items() if plan == "depth router")
    says(f"60 % skip is {each('depth router', lambda row: format(row['kl'], '.3f'))}, the static",
         f"plan's {each('static', lambda row: format(row['kl'], '.3f'))};",
         f"captures {each('depth router', lambda row: format(100 * row['captured'], '.0f'))} % of what",
         f"captures {each('token alone', lambda row: format(100 * row['captured'], '.0f'))} %, position",
         f"{found['labels']:,} labelled tokens, {at['static', 0.25]['tokens']:,} tokens of {at['static', 0.25]['documents']} test")
    scaling = [row for row in found["scaling"] if row["budget"] == 0.25]
    says(f"is {listed([format(row['kl'], '.3f') for row in scaling])} with "
         f"{listed([format(row['labels'], ',') for row in scaling])} labels")


def test_the_reported_routers_were_not_trained_by_gradients():
    """Gradients trained LoRA and adapters alone: routers keep what the regression gave them."""
    logs = sorted((ROOT / "results" / "pareto").glob("router-*/router/log.csv"))
    assert logs
    assert all(pd.read_csv(path)["temperature"].isna().all() for path in logs)


def test_what_the_shipped_router_knows():
    found = metrics("token_analysis/nano")
    collapse = found["collapse"]
    says(f"Its {collapse['plans']} plans are all in use, the commonest for "
         f"{100 * collapse['commonest_plan']:.0f} % of the tokens; of 12 routable layers "
         f"{len(collapse['always'])} always runs and {len(collapse['never'])} never do; "
         f"{100 * found['static']['checkpoint']['agreement']:.1f} % of its gates",
         f"costs {found['shuffled']['nll_difference']:.3f} nats a token "
         f"({found['shuffled']['low']:.3f} to "
         f"{found['shuffled']['high']:.3f}); {100 * found['variance']['layers']:.0f} % of the "
         "plan's variance lies between layers",
         f"explains {100 * found['between']['token']:.0f} % of the variance of depth")
    assert not collapse["flags"]
    twenty, forty, sixty = (row for row in found["rows"] if row["weights"] == "checkpoint")
    says(f"at {100 * forty['skip']:.1f} % skip its KL from the dense model is "
         f"{forty['oracle']:.3f}, against {forty['static']:.3f} for the best static plan "
         f"and {forty['routed']:.3f} for the router, which so captures "
         f"{100 * forty['captured']:.0f} % of that headroom "
         f"({100 * forty['captured_low']:.0f} to {100 * forty['captured_high']:.0f} %; "
         f"{forty['tokens']:,} tokens of "
         f"{forty['documents']} documents); at {100 * twenty['skip']:.1f} and "
         f"{100 * sixty['skip']:.1f} % it captures {100 * twenty['captured']:.0f} and "
         f"{100 * sixty['captured']:.0f} %")
    assert all(row["captured_low"] > 0 for row in found["rows"])
    r2 = {(row["depth"], row["probe"]): 100 * row["r2"] for row in found["probes"]}
    says(f"explain {r2[4, 'linear']:.0f} to {r2[4, 'MLP']:.0f} % of the variance of a layer's harm",
         f"{r2[12, 'linear']:.0f} to {r2[12, 'MLP']:.0f} % from the state after layer 12")


def test_four_perplexities_of_one_model():
    own = metrics("base_model/default")["rows"][0]["perplexity"]
    recorded = Record.load(
        ROOT / "results" / "token_analysis" / "nano" / "record").perplexity("dense")
    base = rows("token_routing/default")["base"]["perplexity"]
    says(f"{own:.2f} in notebook 00", f"{base:.2f} in 01 to 04",
         f"{recorded:.2f} in 07 (96 documents cut to 192)")
    shown = (ROOT / "notebooks" / "05_evaluation.ipynb").read_text(encoding="utf-8")
    assert re.search(r"0 +base +0\.0% .* 21\.34 \(", shown), "what 05 shows of the base"
    says("21.34 in 05")


LATENCY = [("TinyLlama-1.1B shapes", "tinyllama"), ("embedded model", "default"),
           ("Qwen2.5-3B shapes, 12 of 36 layers", "qwen2.5-3b")]


def timed(run: str) -> pd.DataFrame:
    table = pd.DataFrame(metrics(f"latency/{run}")["rows"])
    return table[(table["part"] == "end to end") & (table["batch"] == 1)]


def speedups(table: pd.DataFrame, work: str, system: str, column: str = "speedup") -> str:
    part = table[(table["work"] == work) & (table["system"] == system) &
                 (table["skip"] > 0)].sort_values("skip")
    return ", ".join(f"{value:.2f}" for value in part[column]) or "–"


@pytest.mark.parametrize(("name", "run"), LATENCY)
def test_every_latency_row_is_one_run(name, run):
    table = timed(run)
    budgets = ", 40 and 50 %" if run == "qwen2.5-3b" else ""
    for work in ("decode", "prefill"):
        cells = [
            speedups(table, work, "compact", "bound"),
            *(speedups(table, work, system)
              for system in ("truncation", "compact", "masked", "two-pass"))
        ]
        says(f"| {name}, {work}{' 512' if work == 'prefill' else ''}{budgets} | "
             f"{' | '.join(cells)} |")


def test_what_is_said_about_latency():
    tiny, own, again = timed("tinyllama"), timed("default"), timed("nano")
    def share(table, column, work):
        part = table[(table["system"] == "compact") & (table["work"] == work) &
                     (table["skip"] > 0)].sort_values("skip")
        return part[column].tolist()
    reached = [f"{100 * value:.0f}" for value in share(tiny, "share_of_bound", "prefill")]
    says(f"TinyLlama's prefill reaches {reached[0]}, {reached[1]} and {reached[2]} % of the "
         "layer-count bound")
    assert share(tiny, "share_of_truncation", "decode") == pytest.approx([1.0] * 3, abs=0.01)
    free = [
        table[(table["system"] == "compact") & (table["skip"] == 0)]["speedup"].iloc[0]
        for table in (tiny, own)
    ]
    says(f"compact execution runs at {free[0]:.2f} (TinyLlama) and {free[1]:.2f} (embedded model) "
         "of dense")
    def listed(work):
        first, second, third = speedups(again, work, "compact").split(", ")
        return f"{first}, {second} and {third} in {work}"
    says(f"gives {listed('decode')} and {listed('prefill')}")
    products = [row["product_bound"] for row in metrics("latency/tinyllama")["products"]]
    says(f"would allow {products[0]:.2f}, {products[1]:.2f} and {products[2]:.2f}, within 3 % of "
         "what was measured")
    assert np.array(products) == pytest.approx(np.array(share(tiny, "speedup", "prefill")),
                                               rel=0.03)
    memory = max(row["memory_over_dense"] for _, run in LATENCY
                 for row in metrics(f"latency/{run}")["costs"])
    says(f"Extra memory is at most {100 * memory:.1f} %")
    worst = [max(abs(table[q] / table["median"] - 1).max() for q in ("q1", "q3"))
             for table in (own, tiny, timed("qwen2.5-3b"))]
    bounds = [int(np.ceil(100 * value)) for value in worst]
    says(f"within {bounds[0]} % of the medians for the embedded model, {bounds[1]} % for "
         f"TinyLlama and {bounds[2]} % for Qwen")
    records = {
        run: json.loads(
            (ROOT / "results" / "latency" / run / "run.json").read_text(encoding="utf-8"))
        for run in ("default", "nano")
    }
    assert len({record["started"][:10] for record in records.values()}) == 1, "measured on one day"


def test_blimp():
    found = metrics("evaluation/nano")
    scores = [row["scores"][0] for row in found["rows"]]
    skips = ["0" if not row["skip"] else f"{100 * row['skip']:.1f} %" for row in found["rows"]]
    accuracy = [f"{score['score']:.3f} ± {score['stderr']:.3f}" for score in scores]
    short = [str(len(score["tasks_not_above_chance"])) for score in scores]
    says("| | " + " | ".join(row["variant"] for row in found["rows"]) + " |",
         f"| accuracy (chance 0.5) | {' | '.join(accuracy)} |",
         f"| measured skip on the scored tokens | {' | '.join(skips)} |",
         f"| paradigms of 67 not above chance | {' | '.join(short)} |")
    first, second = found["against_static"]
    says(f"by {-first['difference']:.4f} ({-first['high']:.4f} to {-first['low']:.4f}) at 20 % "
         f"and {-second['difference']:.4f} "
         f"({-second['high']:.4f} to {-second['low']:.4f}) at 40 %")
    row = metrics("evaluation/nano-router-5-shot-limit-2")["rows"][0]
    says(f"{100 * row['skip']:.1f} % skipped on the scored tokens, "
         f"{100 * row['context_skip']:.1f} % on prompts and examples")


def test_the_embedded_models_own_page():
    page = plain((ROOT / "dlr" / "nano" / "README.md").read_text(encoding="utf-8"))
    found = metrics("base_model/scores")
    for row in found["rows"]:
        says(f"| {row['text']} | {row['bits_per_byte']:.3f} ({row['low']:.3f}, {row['high']:.3f}) "
             f"| {row['perplexity']:.2f} | "
             f"{row['tokens']:,} |", text=page)
    harm = found["layer_harm"]
    says(f"skipping layer 0 adds {harm[0]:.2f} nats a token on the embedded test split, the last "
         f"layer {harm[-1]:.2f}, each other layer "
         f"between {min(harm[1:-1]):.3f} and {max(harm[1:-1]):.3f}", text=page)
