"""Command line of the workbook: `python -m dlr run`, `sweep`, `explore`, `eval` and `notebooks`."""

import argparse
import os
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
  python -m dlr notebooks 03                              execute a committed notebook anew, in place

DLR_RESULTS and DLR_CACHE name other folders for results and derived data. --debug, or DLR_DEBUG=1, shows tracebacks.
"""
QUICK = Path(__file__).resolve().parent.parent / "params" / "token_routing" / "quick.yaml"
FOLDERS = ("DLR_RESULTS", "DLR_CACHE")


def parser() -> argparse.ArgumentParser:
    from dlr import evalcommand, serve
    from dlr.config import PHASES
    shape = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser("python -m dlr", description="Dynamic Layer Routing: run experiments.", **shape)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run notebooks of one or more phases", **shape)
    run.add_argument("phases", nargs="*", metavar="phase", help=f"{', '.join(PHASES)}; none: a tour")
    run.add_argument("--params", metavar="FILE", help="YAML file of settings that differ from the defaults")
    run.add_argument("--set", action="append", default=[], metavar="name=value", help="one setting; may be repeated")
    run.add_argument("--name", help="name of the run's folder (default: the params file's, or 'default'; where that is "
                                    "another run, a name that says what differs)")
    run.add_argument("--force", action="store_true", help="run again what is finished; with --name, replace what is "
                                                          "there")
    sweep = commands.add_parser("sweep", help="run a grid of settings", **shape)
    sweep.add_argument("file", help="YAML file with phase, grid and common settings")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    sweep.add_argument("--name", default="", help="begins the names of the runs: a sweep beside another one")
    sweep.add_argument("--force", action="store_true", help="run all of it again, in place of what is there")
    serve.add_parser(commands, argparse.RawDescriptionHelpFormatter)
    evalcommand.add_parser(commands)
    notebooks = commands.add_parser("notebooks", help="execute committed notebooks anew, in place", **shape)
    notebooks.add_argument("names", nargs="*", metavar="notebook", help="name, number or phase (default: all)")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=os.environ.get("DLR_DEBUG", "0") not in ("", "0"),
                             help=argparse.SUPPRESS)
    return top


def run(arguments) -> int:
    from dlr import notebooks
    from dlr.config import PHASES
    from dlr.places import Wanted, beside, made, named, schema_of, shown_path
    from dlr.settings import validated
    from dlr.workbook import checked_parameters, effective_of
    tour = not arguments.phases
    params = arguments.params or (str(QUICK) if tour else None)
    explicit = arguments.name or next((text.partition("=")[2] for text in reversed(arguments.set)
                                       if text.partition("=")[0].strip() == "run_name"), None)
    plans = []
    for phase in arguments.phases or ["token_routing"]:
        parameters = checked_parameters(phase, params, arguments.set)
        name = explicit or parameters.get("run_name") or (Path(params).stem if params else "default")
        validated({"run_name": name}, schema_of(phase))
        plans.append((phase, name, parameters))
    if tour:
        print("This regresses a token-level router on how much each layer's absence harms each token, and calibrates it\n"
              "on held-out text; trains LoRA three times on the embedded base, under that router, under the best static\n"
              "plan and at full depth; and evaluates the router beside its controls on the test split.\n"
              "About 7 minutes on two CPU cores without fast bfloat16, half that on newer ones.", flush=True)
    for phase, name, parameters in plans:
        notebook = notebooks.read_pair(PHASES[phase][0])
        wanted = Wanted(phase, effective_of(phase, parameters, notebook))
        place = named(wanted, name, arguments.force) if explicit else beside(wanted, name)
        if place.done and not arguments.force:
            print(f"{phase}: finished before, {made(place)}; --force runs it again, --name keeps both. "
                  f"{shown_path(place.folder)}")
            continue
        if arguments.force:
            place.clear()
        started = time.time()
        print(f"{phase}: running notebook, results in {place.folder}", flush=True)
        notebooks.execute(notebook, place.folder / "notebook.ipynb", parameters | {"run_name": place.folder.name})
        print(f"{phase}: done in {(time.time() - started) / 60:.1f} minutes")
        for label, pattern in (("executed notebook", "notebook.ipynb"), ("results table", "table.md"),
                               ("figure", "*.png")):
            for path in sorted(place.folder.glob(pattern)):
                print(f"  {label:<18} {path}")
    return 0


def sweep(arguments) -> int:
    from dlr.sweeps import run_sweep, write_table
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be 1 or more")
    table, failed = run_sweep(arguments.file, arguments.jobs, arguments.name, arguments.force)
    if len(table):
        text, path = write_table(arguments.file, table, arguments.name)
        print(f"{text}\n{path}")
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def explore(arguments) -> int:
    from dlr.serve import explore as command
    return command(arguments)


def evaluation(arguments) -> int:
    from dlr.evalcommand import evaluate_command
    return evaluate_command(arguments)


def notebooks(arguments) -> int:
    from dlr.notebooks import refresh
    refresh(arguments.names, print)
    return 0


EXPECTED = ("SettingsError", "NotRoutable", "WrongBase")       # beside built-in errors of values and files


def _expected(error: BaseException) -> bool:
    """Whether an error is one that a sentence explains: of settings, values, files. Others are shown with traceback."""
    import builtins
    if type(error).__name__ != "PapermillExecutionError":
        return isinstance(error, (OSError, ValueError))
    kind = getattr(builtins, error.ename, None)
    return error.ename in EXPECTED or isinstance(kind, type) and issubclass(kind, (OSError, ValueError))


def say_error(error: BaseException) -> str:
    """One clear sentence for the terminal; the last line of a notebook's own error where papermill wraps one."""
    if type(error).__name__ == "PapermillExecutionError":
        return f"{error.ename}: {error.evalue}"
    return str(error) or type(error).__name__


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for variable in FOLDERS:                 # kernels and sweeps run elsewhere; the caller's folder is what is meant
        if os.environ.get(variable):
            os.environ[variable] = str(Path(os.environ[variable]).expanduser().absolute())
    commands = {"run": run, "sweep": sweep, "explore": explore, "eval": evaluation, "notebooks": notebooks}
    try:
        return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug or not _expected(error):
            raise
        print(f"error: {say_error(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
