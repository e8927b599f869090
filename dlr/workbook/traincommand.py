"""`python -m dlr train`: the variants of a run, trained by as many processes as were started.

The notebook of the phase then finds them in the run's folder, evaluates and draws. What takes
seconds to import is imported by the command itself, as in `evalcommand`.
"""

import argparse
import shlex
from pathlib import Path

from dlr import processes
from dlr.runs import Run, shown_path
from dlr.settings import SettingsError
from dlr.train.stopping import Stopped, heeding
from dlr.workbook.phases import PHASES
from dlr.workbook.places import Wanted, beside, named
from dlr.workbook.runner import checked_parameters, effective_of, name_of

EXAMPLES = """examples:
  torchrun --nproc-per-node 4 -m dlr train --params params/token_routing/llama3.1-8b.yaml
  python -m dlr run token_routing --params params/token_routing/llama3.1-8b.yaml
                              finds what was trained, evaluates and draws, in one process
  accelerate launch --multi_gpu --num_processes 4 -m dlr train --params FILE --set shard=true
                              the base's layers spread over the GPUs (FSDP2), for large bases
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m dlr train --params FILE    on each of two machines, which share the results folder
  python -m dlr train pareto --params FILE --set point=baselines    one process will do

batch_size is the whole batch, which the processes share equally: tables do not change with the
machine. More processes than batch_size need a larger batch, and as much less accumulation for the
same step: --set batch_size=8 --set accumulation=2 where the file says 4 and 4. The same command,
with as many processes, goes on where a killed one stopped, and with --fresh begins anew. SIGTERM
has all processes save the step in progress and exit with 75. Do not use accelerate launch --cpu,
which starts one process whatever it is told: torchrun works without a GPU.
"""


def add_parser(commands) -> None:
    """The `train` command's arguments."""
    command = commands.add_parser("train", help="train a run's variants, in several processes",
                                  epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("phase", nargs="?", help="token_routing, pareto, baselines ... (default: the folder of the "
                                 "params file)")
    add("--params", metavar="FILE", help="YAML file of settings that differ from the defaults")
    add("--set", action="append", default=[], metavar="name=value",
        help="one setting; may be repeated")
    add("--name", help="name of the run's folder, as with 'run'")
    add("--fresh", action="store_true", help="begin anew what was begun and is not finished")


def train_command(arguments) -> int:
    """Trains what is not trained yet; 0 when all of it is."""
    from dlr.train.several import share_of_batch
    from dlr.workbook.variants import TRAININGS
    folder = Path(arguments.params).resolve().parent.name if arguments.params else ""
    phase = arguments.phase or folder
    if phase not in TRAININGS:
        given = "is a phase that trains nothing here" if phase in PHASES else "is no phase"
        raise SettingsError(f"{phase!r} {given}; say which of {', '.join(TRAININGS)} to train")
    parameters = checked_parameters(phase, arguments.params, arguments.set)
    config = effective_of(phase, parameters)
    trainings = TRAININGS[phase](config)
    processes.begin()
    share = share_of_batch(config.batch_size, processes.count())
    name, is_given = name_of(phase, arguments, parameters)
    run = _started(Wanted(phase, config), name, is_given, arguments.fresh)
    if run.done:
        processes.say(f"{phase}: finished before, {shown_path(run.folder)}")
        processes.end()
        return 0
    processes.say(f"{phase}: {len(trainings)} variants, {processes.count()} process(es) with "
                  f"{share} of a batch's {config.batch_size} sequences each, results in "
                  f"{run.folder}")
    try:
        with heeding(_stop):             # a training's own answer takes the place of this one
            _train(trainings, config, run)
    except BaseException:
        if processes.is_first():
            run.forget_if_empty()
        raise
    processes.say(f"trained; now {_next(arguments, phase, run)}")
    processes.end()
    return 0


def _stop() -> None:
    raise Stopped("the same command goes on from what is saved")


def _started(wanted: Wanted, name: str, is_given: bool, fresh: bool) -> Run:
    """The run, begun by the first process; what keeps it from that is raised in all of them."""
    outcome = None
    if processes.is_first():
        try:
            run = named(wanted, name) if is_given else beside(wanted, name)
            if fresh and not run.done:
                run.clear()
            outcome = (run if run.done else wanted.start(run)).folder
        except (OSError, ValueError) as error:
            outcome = error
    outcome = processes.agreed(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return Run(outcome)


def _train(trainings: list, config, run: Run) -> None:
    from dlr.workbook.study import open_bench
    bench = None
    for training in trainings:
        processes.say(f"  {training.name}")
        bench = bench or open_bench(config)
        variant = training.run(bench, run.folder)
        if config.shard:              # the base is in pieces now; the next variant has a fresh one
            bench = variant = None
        else:
            variant.close()


def _next(arguments, phase: str, run: Run) -> str:
    """The command that evaluates what was trained."""
    words = ["python", "-m", "dlr", "run", phase]
    if arguments.params:
        words += ["--params", arguments.params]
    for text in arguments.set:
        words += [] if text.startswith("shard=") else ["--set", text]
    return shlex.join([*words, "--name", run.folder.name])
