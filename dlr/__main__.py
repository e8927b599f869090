"""Command line of the workbook: `python -m dlr run`, `python -m dlr sweep`."""

import argparse
import shutil
import sys
import time
from pathlib import Path

EXAMPLES = """examples:
  python -m dlr run                                       train, calibrate and evaluate a router beside its controls
  python -m dlr run token_routing --set target_skip=0.3   the same at another budget
  python -m dlr run token_routing --params params/token_routing/tinyllama.yaml
  python -m dlr sweep params/pareto/nano.yaml             targets x seeds; finished runs are skipped
  python -m dlr explore "Any text."                       what every token costs, in the terminal; --serve: in a browser
  python -m dlr eval nano-router --tasks blimp            benchmark tasks through lm-evaluation-harness
"""
QUICK = Path(__file__).resolve().parent.parent / "params" / "token_routing" / "quick.yaml"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m dlr", description="Dynamic Layer Routing: run experiments.", epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run notebooks of one or more phases", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_argument("phases", nargs="*", metavar="phase",
                     help="base_model, baselines, sequence_routing, token_routing, pareto, token_analysis; none: a tour")
    run.add_argument("--params", metavar="FILE", help="YAML file of settings that differ from the defaults")
    run.add_argument("--set", action="append", default=[], metavar="name=value", help="one setting; may be repeated")
    run.add_argument("--name", help="name of the run's folder (default: from the params file, or 'default')")
    run.add_argument("--force", action="store_true", help="run again what is finished")
    sweep = commands.add_parser("sweep", help="run a grid of settings", epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep.add_argument("file", help="YAML file with phase, grid and common settings")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    from dlr import serve
    serve.add_parser(commands, argparse.RawDescriptionHelpFormatter)
    from dlr import evalcommand
    evalcommand.add_parser(commands)
    return top


def explore(arguments) -> int:
    from dlr.serve import explore as command
    return command(arguments)


def evaluation(arguments) -> int:
    from dlr.evalcommand import evaluate_command
    return evaluate_command(arguments)


def run(arguments) -> int:
    from dlr.config import PHASES, validated
    from dlr.runs import METRICS, Run, results_folder
    from dlr.workbook import checked_parameters, run_notebook
    tour = not arguments.phases
    params = arguments.params or (str(QUICK) if tour else None)
    plans = []
    for phase in arguments.phases or ["token_routing"]:
        parameters = checked_parameters(phase, params, arguments.set)
        name = arguments.name or parameters.get("run_name") or (Path(params).stem if params else "default")
        parameters["run_name"] = name
        validated(parameters, PHASES[phase][1])
        plans.append((phase, parameters))
    if tour:
        print("This trains three models on the embedded base: LoRA at full depth, the best static plan, and a token-level\n"
              "router; calibrates the router on held-out text, and evaluates it beside its controls on the test split.\n"
              "About 7 minutes on two CPU cores without fast bfloat16, half that on newer ones.", flush=True)
    for phase, parameters in plans:
        folder = results_folder() / phase / parameters["run_name"]
        if Run(folder).done and not arguments.force:
            print(f"{phase}: finished before; --force runs it again, --name keeps both. {folder}")
            continue
        (folder / METRICS).unlink(missing_ok=True)
        if arguments.force:
            (folder / "run.json").unlink(missing_ok=True)
            (folder / "log.csv").unlink(missing_ok=True)
            shutil.rmtree(folder / "tasks", ignore_errors=True)
        started = time.time()
        print(f"{phase}: running notebook, results in {folder}", flush=True)
        run_notebook(phase, parameters)
        print(f"{phase}: done in {(time.time() - started) / 60:.1f} minutes")
        for label, pattern in (("executed notebook", "notebook.ipynb"), ("results table", "table.md"),
                               ("figure", "*.png")):
            for path in sorted(folder.glob(pattern)):
                print(f"  {label:<18} {path}")
    return 0


def sweep(arguments) -> int:
    from dlr.config import read_params
    from dlr.runs import results_folder, write_atomically
    from dlr.workbook import run_sweep, seeds_table
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be 1 or more")
    table, failed = run_sweep(arguments.file, arguments.jobs)
    if len(table):
        text = seeds_table(table).to_markdown(index=False)
        path = results_folder() / read_params(arguments.file)["phase"] / "table.md"
        write_atomically(path, text + "\n")
        print(f"{text}\n{path}")
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from dlr.workbook import say_error
    try:
        return {"run": run, "sweep": sweep, "explore": explore, "eval": evaluation}[arguments.command](arguments)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ not in ("PapermillExecutionError", "SettingsError", "NotRoutable", "WrongBase") and \
                not isinstance(error, (OSError, ValueError)):
            raise
        print(f"error: {say_error(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
