"""`python -m dlr eval CHECKPOINT`: benchmarks of one checkpoint, resumable task by task.

The command line builds its parser from here, so what takes seconds to import is imported by the
command itself.
"""

import argparse
import json

from dlr import processes
from dlr.base.identity import begin
from dlr.runs import Run, results_folder, slug
from dlr.settings import PhaseSettings, validated

EXAMPLES = """examples:
  python -m dlr eval nano-router --tasks mmlu,arc_challenge,gsm8k --num-fewshot 5
  python -m dlr eval results/pareto/<run>/router/checkpoint --tasks wikitext103 --data-dir DIR
  python -m dlr eval pareto --variant static --tasks blimp --limit 200
                      newest run of a phase, its router's weights under the greedy static plan
  accelerate launch --multi_gpu --num_processes 8 -m dlr eval CHECKPOINT --tasks mmlu \
      --batch-size auto                   a process a card; every answer is that of one process
  torchrun --nproc-per-node 2 -m dlr eval nano-router --tasks embedded         without a card too

tasks: any task, group or tag of lm-evaluation-harness (mmlu, arc_challenge, gsm8k, hellaswag,
winogrande, lambada_openai, blimp ...), wikitext103 and embedded (strided perplexity). --data-dir
serves mmlu, arc_challenge, gsm8k, blimp and wikitext103.
"""


def add_parser(commands) -> None:
    command = commands.add_parser("eval", help="run benchmark tasks on a checkpoint",
                                  epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("checkpoint", help="checkpoint folder, run folder, phase, 'nano-router', or a base model")
    add("--tasks", required=True, metavar="A,B", help="tasks, groups or tags, separated by commas")
    add("--num-fewshot", type=int, metavar="N",
        help="examples before each question (default: the task's)")
    add("--limit", type=float, metavar="N", help="rows of each task (below 1: a share of them)")
    add("--data-dir", metavar="DIR", help="folder of local files instead of the hub")
    add("--variant", choices=["routed", "static", "stochastic", "dense", "base"],
        help="what decides which layers run (default: what the checkpoint is)")
    add("--skip", type=float, help="skip ratio: the router's dial, a static plan, or layers "
                                   "dropped")
    add("--order", metavar="RUN", help="run whose greedy static order --variant static takes")
    add("--model", help="base model to load the checkpoint onto (default: the one it names)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the base model's weights (default: what the checkpoint was trained at)")
    add("--load-in-4bit", action=argparse.BooleanOptionalAction,
        help="NF4 weights of the base model (default: as the checkpoint was trained)")
    add("--attn-implementation", metavar="NAME",
        help="sdpa, eager, flash_attention_2, or auto (default sdpa)")
    add("--revision", metavar="REVISION",
        help="of the base model on the Hub (default: as the checkpoint was trained)")
    add("--batch-size", default=16, metavar="N",
        help="requests a batch, in each process (default 16); auto: as many as the card holds")
    add("--max-batch-size", metavar="N", help="bounds --batch-size auto (default 64)")
    add("--name", help="name of the results folder below results/evaluation/")


def _refuse(arguments, tasks: list[str]) -> None:
    if not tasks:
        raise ValueError("--tasks needs at least one name, for example --tasks arc_challenge,gsm8k")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {arguments.num_fewshot} must be 0 or more")
    if arguments.limit is not None and arguments.limit <= 0:
        raise ValueError(f"--limit {arguments.limit} must be above 0")
    if arguments.name is not None:
        if not arguments.name.strip("."):
            raise ValueError(f"--name {arguments.name!r} must be a folder's name, not a way up")
        validated({"run_name": arguments.name}, PhaseSettings)


def evaluate_command(arguments) -> int:
    """Runs the tasks, keeps their results and prints the table; 0 where all went well."""
    from dlr.base.opened import load
    from dlr.bench.harness import DLRLM
    from dlr.bench.run import precision_of, run_benchmark
    from dlr.bench.tasks import PERPLEXITIES, manager_for
    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    _refuse(arguments, tasks)
    processes.begin()
    # a mistyped name costs no model loading
    manager_for([name for name in tasks if name not in PERPLEXITIES])
    loaded = load(arguments.checkpoint, variant=arguments.variant, skip=arguments.skip,
                  order=arguments.order, model=arguments.model, dtype=arguments.dtype,
                  load_in_4bit=arguments.load_in_4bit, revision=arguments.revision,
                  attn_implementation=arguments.attn_implementation, say=processes.say)
    dialled = "" if arguments.skip is None else f"-skip={arguments.skip}"
    checkpoint = loaded.checkpoint.removesuffix("/checkpoint")
    label = arguments.name or slug(f"{checkpoint}-{loaded.name}{dialled}")
    run = Run(results_folder() / "evaluation" / label)
    lm = DLRLM(loaded=loaded, batch_size=arguments.batch_size,
               max_batch_size=arguments.max_batch_size)
    if processes.is_first():
        print(f"results in {run.folder}", flush=True)
        begin(run, {"checkpoint": loaded.checkpoint, "variant": loaded.kind, "skip": arguments.skip,
                    "digest": loaded.digest, "base": precision_of(loaded.base)}, loaded.digest)
    result = run_benchmark(lm, tasks, run.folder / loaded.name, data_dir=arguments.data_dir,
                           limit=arguments.limit, num_fewshot=arguments.num_fewshot)
    if processes.is_first():
        _keep(run, lm, result, tasks, arguments)
    processes.end()
    return 0


def _keep(run: Run, lm, result: dict, tasks: list[str], arguments) -> None:
    """Writes the run's metrics and prints its table."""
    from dlr.bench.table import environment, row_of, scores_table
    row = row_of(lm, result, tasks)
    run.finish([row], environment=environment(), tasks=tasks, limit=arguments.limit,
               num_fewshot=arguments.num_fewshot, harness={lm.loaded.name: result["harness"]})
    print(scores_table([row]).T.to_markdown(headers=["", ""]))
    for note in sorted({note for score in row["scores"] for note in score.get("notes", [])}):
        print(f"note: {note}")
    if row["context_skip"] is not None:
        print(json.dumps({"skip on scored tokens": round(row["skip"], 4),
                          "on prompt and examples": round(row["context_skip"], 4)}))
