"""`python -m dlr sweep FILE`: a grid of settings on this machine or on a cluster, and its table."""

import argparse
from collections import Counter

from dlr.runs import Run, results_folder
from dlr.workbook import cluster
from dlr.workbook.phase_run import run_point
from dlr.workbook.runner import results_table
from dlr.workbook.sweeps import points_of, run_here, slot_environment, unfinished, write_table

EXAMPLES = """examples:
  python -m dlr sweep params/pareto/nano.yaml --jobs 2    what is not finished, two runs at a time
  python -m dlr sweep params/pareto/tinyllama.yaml --cluster slurm \\
      --slurm partition=gpu,gpus_per_node=1,cpus_per_task=8,timeout_min=480
  python -m dlr sweep params/pareto/tinyllama.yaml        any time: what is finished, runs, failed
  python -m dlr sweep params/pareto/tinyllama.yaml --print-array --slurm partition=gpu > array.sh

On a cluster each point is one task of an array. A point that is stopped is queued again, and goes
on from its last checkpoint. The same command with --cluster submits again what failed. Download
models first where the network is: the tasks take HF_HUB_OFFLINE=1 and all else from your shell.
Logs lie in results/scratch/jobs, and results on a disk that all machines share.
"""


def add_parser(commands) -> None:
    command = commands.add_parser("sweep", help="run a grid of settings", epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("file", help="YAML file with phase, grid and common settings")
    add("--jobs", type=int, metavar="N",
        help="runs at a time on this machine, each on a card of its own (default 1)")
    add("--name", default="", help="begins the names of the runs: a sweep beside another one")
    add("--set", action="append", default=[], metavar="name=value",
        help="one setting of every point; repeatable")
    add("--force", action="store_true", help="run all of it again, in place of what is there")
    add("--cluster", choices=["slurm", "local"],
        help="submit what is not finished; local: all at once as jobs of this machine, for a try")
    add("--slurm", action="append", default=[], metavar="name=value,...",
        help="of each job: partition, timeout_min, mem_gb, gpus_per_node, cpus_per_task, qos, ...")
    add("--print-array", action="store_true",
        help="print a job array for sbatch instead, for login nodes without Python")
    add("--point", type=int, metavar="N",
        help="run point N of the file alone (0: the first), as a task of such an array does")


def _refuse(arguments) -> None:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be 1 or more")
    ways = {"--jobs": arguments.jobs is not None, "--cluster": arguments.cluster,
            "--print-array": arguments.print_array, "--point": arguments.point is not None}
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different ways to run a sweep; give one.")
    if arguments.slurm and not (arguments.cluster == "slurm" or arguments.print_array):
        raise ValueError("--slurm says what Slurm's jobs ask for; it goes with --cluster slurm or "
                         "--print-array.")
    cluster.options_of(arguments.slurm)
    if arguments.force and given and given[0] in ("--print-array", "--point"):
        raise ValueError(f"--force has no effect on {given[0]}, whose tasks may begin twice; give "
                         "the sweep another --name.")


def sweep_command(arguments) -> int:
    """Runs, submits or reports a sweep and writes its table; 1 where something failed."""
    _refuse(arguments)
    phase, points = points_of(arguments.file, arguments.name, arguments.set)
    if arguments.print_array:
        command = ["python", "-m", "dlr", "sweep", arguments.file]
        command += ["--name", arguments.name] if arguments.name else []
        command += [word for text in arguments.set for word in ("--set", text)]
        print(cluster.array_script(command, len(points), cluster.options_of(arguments.slurm)))
        return 0
    if arguments.point is not None:
        return _run_one(phase, points, arguments.point)
    waiting = unfinished(phase, points, arguments.force)
    jobs = {name: cluster.job_of(results_folder() / phase / name) for name, _ in waiting}
    jobs = {name: job for name, job in jobs.items() if job is not None}
    states = cluster.living(jobs)
    free = [(name, parameters) for name, parameters in waiting if name not in states]
    ended = {name: job for name, job in jobs.items() if name not in states}
    failed = []
    if arguments.cluster:
        states |= _submit(phase, free, ended, arguments)
    elif jobs and arguments.jobs is None and not arguments.force:
        failed = list(ended)
    else:
        together = arguments.jobs or 1
        print(f"{len(points)} runs, {len(points) - len(waiting)} finished already, {together} at a "
              "time", flush=True)
        for name in ended:
            (results_folder() / phase / name / cluster.JOB).unlink()
        ended = {}
        failed = run_here(phase, free, together, arguments.force)
    if jobs or arguments.cluster:
        _report(phase, points, states, ended, failed)
    return _table(arguments, phase, points, failed)


def _run_one(phase: str, points: list[tuple[str, dict]], place: int) -> int:
    if not 0 <= place < len(points):
        raise ValueError(f"--point {place} must lie between 0 and {len(points) - 1}: the sweep has "
                         f"{len(points)} points.")
    name, parameters = points[place]
    cluster.claim_for_this_job(results_folder() / phase / name)
    run_point(phase, name, parameters)
    return 0


def _submit(phase: str, points: list, ended: dict, arguments) -> dict[str, str]:
    """Name to state of the points that were submitted."""
    environments = [slot_environment(place, len(points)) if arguments.cluster == "local" else {}
                    for place in range(len(points))]
    if not points:
        return {}
    submitted = cluster.submit(phase, points, ended, arguments.cluster,
                               cluster.options_of(arguments.slurm), environments, arguments.force)
    return {name: f"submitted as job {job}" for name, job in submitted.items()}


def _report(phase: str, points: list, states: dict, ended: dict, failed: list[str]) -> None:
    said = {}
    for name, _ in points:
        folder = results_folder() / phase / name
        if name in states:
            said[name] = states[name]
        elif name in failed:
            said[name] = "failed"
        else:
            said[name] = "finished" if Run(folder).done else "not begun"
    counts = Counter(state.split()[0] for state in said.values())
    print(f"{len(points)} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    for name, state in said.items():
        if state not in ("finished", "not begun"):
            print(f"  {name}: {state}")
            if name in failed and name in ended:
                print(f"    {results_folder() / phase / name / 'output.txt'}\n"
                      f"    {ended[name].get('log', 'no log: its submission was broken off')}")
    if ended and failed:
        print("The same command with --cluster submits again what failed; with --jobs N it runs "
              "here.")


def _table(arguments, phase: str, points: list, failed: list[str]) -> int:
    table = results_table(phase, names=[name for name, _ in points])
    if len(table):
        text, path = write_table(arguments.file, table, arguments.name)
        print(f"{text}\n{path}")
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0
