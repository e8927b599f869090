"""`python -m dlr eval CHECKPOINT`: benchmarks of one checkpoint, resumable task by task."""

import argparse
import json

EXAMPLES = """examples:
  python -m dlr eval nano-router --tasks mmlu,arc_challenge,gsm8k --num-fewshot 5
  python -m dlr eval results/pareto/<run>/router/checkpoint --tasks blimp,wikitext103 --data-dir DIR --limit 200
  python -m dlr eval pareto --variant static --tasks blimp
                      newest run of a phase, its router's weights under the greedy static plan

tasks: any task, group or tag of lm-evaluation-harness (mmlu, arc_challenge, gsm8k, hellaswag, winogrande, lambada_openai,
blimp ...), wikitext103 and embedded (strided perplexity). --data-dir serves mmlu, arc_challenge, gsm8k, blimp and wikitext103.
"""


def add_parser(commands) -> None:
    command = commands.add_parser("eval", help="run benchmark tasks on a checkpoint", epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("checkpoint", help="checkpoint folder, run folder, phase, 'nano-router', or a base model")
    command.add_argument("--tasks", required=True, metavar="A,B", help="tasks, groups or tags, separated by commas")
    command.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    command.add_argument("--limit", type=float, metavar="N", help="rows of each task (below 1: a share of them)")
    command.add_argument("--data-dir", metavar="DIR", help="folder of local files instead of the hub")
    command.add_argument("--variant", choices=["routed", "static", "stochastic", "dense", "base"],
                         help="what decides which layers run (default: what the checkpoint is)")
    command.add_argument("--skip", type=float, help="skip ratio: the router's dial, a static plan, or layers dropped")
    command.add_argument("--order", metavar="RUN", help="run whose greedy static order --variant static takes")
    command.add_argument("--model", help="base model to load the checkpoint onto (default: the one it names)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                         help="of the base model's weights (default: what the checkpoint was trained at)")
    command.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction,
                         help="NF4 weights of the base model (default: as the checkpoint was trained)")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests a batch (default 16)")
    command.add_argument("--name", help="name of the results folder below results/evaluation/")


def scores_table(rows: list[dict]):
    """Rows of `dlr.benchmark.row_of` as people read them: a DataFrame, one line a variant."""
    import pandas as pd
    lines = []
    for row in rows:
        line = {"variant": row["variant"], "skip": f"{row['skip']:.1%}", "active layers": f"{row['active_layers']:.2f}",
                "MFLOPs/token": f"{row['flops'] / 1e6:.2f}"}
        for score in row["scores"]:
            text = f"{score['score']:.4f}"
            text += f" ± {score['stderr']:.4f}" if score["stderr"] is not None else ""
            text += "".join(f"; {name.removesuffix(',none')} {value:.4f}" for name, value in score.get("others", {}).items())
            below = score.get("tasks_not_above_chance")
            if below:
                text += f" ({len(below)} of {score['tasks']} tasks not above chance)"
            if score.get("above_chance") is False:
                text += " (not above chance)"
            line[f"{score['task']} ({score['metric'].split(',')[0]})"] = text
        for task, found in row["perplexity"].items():
            for unit in ("token", "word"):
                value, low, high = (found[f"{unit}_perplexity{end}"] for end in ("", "_low", "_high"))
                line[f"{task} ppl/{unit} (95 %)"] = f"{value:.2f} ({low:.2f}–{high:.2f})"
            line[f"{task} bits/byte"] = f"{found['bits_per_byte']:.3f}"
        line["cut on the left"] = f"{row['truncated']} of {row['requests']}"
        lines.append(line)
    return pd.DataFrame(lines)


def environment() -> dict:
    """Versions of what produced the scores."""
    import importlib.metadata as metadata
    return {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers", "peft", "datasets")}


def evaluate_command(arguments) -> int:
    from dlr.benchmark import precision_of, row_of, run_benchmark
    from dlr.config import EvaluationConfig, validated
    from dlr.harness import DLRLM
    from dlr.runs import Run, results_folder, slug
    from dlr.tasks import PERPLEXITIES, manager_for
    from dlr.opened import load
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks needs at least one name, for example --tasks arc_challenge,gsm8k")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {arguments.num_fewshot} must be 0 or more")
    if arguments.limit is not None and arguments.limit <= 0:
        raise ValueError(f"--limit {arguments.limit} must be above 0")
    manager_for([name for name in names if name not in PERPLEXITIES])              # a mistyped name costs no model loading
    if arguments.name is not None and not arguments.name.strip("."):
        raise ValueError(f"--name {arguments.name!r} must be a folder's name, not a way up")
    name = validated({} if arguments.name is None else {"run_name": arguments.name}, EvaluationConfig).run_name
    loaded = load(arguments.checkpoint, variant=arguments.variant, skip=arguments.skip, order=arguments.order,
                  model=arguments.model, dtype=arguments.dtype, load_in_4bit=arguments.load_in_4bit)
    label = name if arguments.name is not None else slug(f"{loaded.checkpoint.removesuffix('/checkpoint')}-{loaded.name}"
                                     + (f"-skip={arguments.skip}" if arguments.skip is not None else ""))
    run = Run(results_folder() / "evaluation" / label)
    lm = DLRLM(loaded=loaded, batch_size=arguments.batch_size)
    print(f"results in {run.folder}", flush=True)
    settings = {"checkpoint": loaded.checkpoint, "variant": loaded.kind, "skip": arguments.skip, "digest": loaded.digest,
                "base": precision_of(loaded.base)}
    run.start(settings, loaded.digest)
    found = run_benchmark(lm, names, run.folder / loaded.name, data_dir=arguments.data_dir, limit=arguments.limit,
                          num_fewshot=arguments.num_fewshot)
    row = row_of(lm, found, names)
    run.finish([row], environment=environment(), tasks=names, limit=arguments.limit, num_fewshot=arguments.num_fewshot,
               harness={loaded.name: found["harness"]})
    print(scores_table([row]).T.to_markdown(headers=["", ""]))
    for note in sorted({note for score in row["scores"] for note in score.get("notes", [])}):
        print(f"note: {note}")
    if row["context_skip"] is not None:
        print(json.dumps({"skip on scored tokens": round(row["skip"], 4), "on prompt and examples":
                          round(row["context_skip"], 4)}))
    return 0
