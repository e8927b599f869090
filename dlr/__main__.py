"""Command line of the workbook: `python -m dlr run`, `train`, `sweep`, `plan`, `explore`, `eval`,
`mixture`, `report` and `notebooks`.
"""

import argparse
import builtins
import os
import sys
import traceback
from pathlib import Path

from dlr.explore import serve
from dlr.train.stopping import EXIT, Stopped
from dlr.workbook import (evalcommand, mixturecommand, plancommand, reportcommand, sweepcommand,
                          traincommand)
from dlr.workbook.phase_run import run_phase
from dlr.workbook.phases import PHASES
from dlr.workbook.runner import checked_parameters, name_of

# Commands that need `dlr.workbook.notebooks` import it: it takes half as long as all of these.

EXAMPLES = """examples:
  python -m dlr run                                       a tour: a router beside its controls
  python -m dlr run token_routing --set target_skip=0.3   the same at another budget
  python -m dlr run token_routing --params params/token_routing/tinyllama.yaml
  torchrun --nproc-per-node 4 -m dlr train --params FILE  its training, in several processes
  python -m dlr sweep params/pareto/nano.yaml             targets x seeds; finished runs are kept
  python -m dlr plan token_routing --params params/token_routing/tinyllama.yaml --memory 16GB
  python -m dlr explore "Any text."                       what every token costs; --serve: browser
  python -m dlr eval nano-router --tasks blimp            tasks of lm-evaluation-harness
  python -m dlr mixture DATA_DIR OUT                      a dataset of five domains
  python -m dlr report                                    one document of all results
  python -m dlr notebooks 03                              execute a committed notebook in place

DLR_RESULTS and DLR_CACHE name other folders for results and derived data. DLR_DEBUG=1 is --debug
for every command. A run or training that SIGTERM asks to end saves its step and exits with 75: the
same command goes on from there, and with --fresh from the start.
"""
TOUR = """\
This fits skip adapters to the embedded base, finds its best static order, labels tokens with the
harm of ever shorter plans, and regresses a depth router on it; trains LoRA three times, under that
router, under the best static plan and at full depth; and evaluates the router beside its controls
on the test split.
About 8 minutes on two CPU cores without fast bfloat16, half that on newer ones."""
TOUR_PARAMS = Path(__file__).resolve().parent.parent / "params" / "token_routing" / "quick.yaml"
FOLDERS = ("DLR_RESULTS", "DLR_CACHE")
SHAPE = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m dlr", **SHAPE,
                                  description="Dynamic Layer Routing: run experiments.")
    commands = top.add_subparsers(dest="command", required=True)
    _add_run(commands)
    sweepcommand.add_parser(commands)
    commands.choices["sweep"].set_defaults(call=sweepcommand.sweep_command)
    serve.add_parser(commands, SHAPE["formatter_class"])
    commands.choices["explore"].set_defaults(call=serve.explore)
    evalcommand.add_parser(commands)
    commands.choices["eval"].set_defaults(call=evalcommand.evaluate_command)
    traincommand.add_parser(commands)
    commands.choices["train"].set_defaults(call=traincommand.train_command)
    mixturecommand.add_parser(commands)
    commands.choices["mixture"].set_defaults(call=mixturecommand.mixture_command)
    plancommand.add_parser(commands)
    commands.choices["plan"].set_defaults(call=plancommand.plan_command)
    reportcommand.add_parser(commands)
    commands.choices["report"].set_defaults(call=reportcommand.report_command)
    command = commands.add_parser("notebooks", **SHAPE,
                                  help="execute committed notebooks anew, in place")
    command.set_defaults(call=notebooks)
    command.add_argument("names", nargs="*", metavar="notebook",
                         help="name, number or phase (default: all)")
    is_debugging = os.environ.get("DLR_DEBUG", "0") not in ("", "0")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=is_debugging,
                             help="show where an error comes from")
    return top


def _add_run(commands) -> None:
    command = commands.add_parser("run", help="run notebooks of one or more phases", **SHAPE)
    command.set_defaults(call=run)
    command.add_argument("phases", nargs="*", metavar="phase",
                         help=f"{', '.join(PHASES)}; none: a tour")
    command.add_argument("--params", metavar="FILE",
                         help="YAML file of settings that differ from the defaults")
    command.add_argument("--set", action="append", default=[], metavar="name=value",
                         help="one setting; may be repeated")
    command.add_argument("--name", help="name of the run's folder (default: the params file's, or "
                         "'default'; where that is another run, a name that says what differs)")
    command.add_argument("--force", action="store_true",
                         help="run again what is finished; with --name, replace what is there, "
                         "whatever its settings")
    command.add_argument("--fresh", action="store_true",
                         help="begin a run anew that was begun and is not finished, from its first "
                         "step; what is finished stays (--force begins that anew too)")


# -- the commands -----------------------------------------------------------------------
def run(arguments) -> int:
    """Runs a phase's notebook after the other; all settings are checked before the first starts."""
    is_tour = not arguments.phases
    arguments.params = arguments.params or (str(TOUR_PARAMS) if is_tour else None)
    plans = []
    for phase in arguments.phases or ["token_routing"]:
        parameters = checked_parameters(phase, arguments.params, arguments.set)
        plans.append((phase, parameters, *name_of(phase, arguments, parameters)))
    if is_tour:
        print(TOUR, flush=True)
    for plan in plans:
        run_phase(*plan, force=arguments.force, fresh=arguments.fresh)
    return 0


def notebooks(arguments) -> int:
    from dlr.workbook.notebooks import refresh
    refresh(arguments.names)
    return 0


# -- errors -----------------------------------------------------------------------
EXPECTED = ("SettingsError", "NotRoutable", "WrongBase")       # of notebooks, beside built-in ones


def _sentence(error: Exception) -> str | None:
    """What explains an error; None for one that nobody foresaw, whose traceback is shown.

    Foreseen are errors of files, and of values where this package raises them; in a notebook, which
    papermill runs elsewhere, by the name of their class.
    """
    if type(error).__name__ == "PapermillExecutionError":
        kind = getattr(builtins, error.ename, None)
        is_foreseen = error.ename in EXPECTED or (isinstance(kind, type)
                                                  and issubclass(kind, (OSError, ValueError)))
        return f"{error.ename}: {error.evalue}" if is_foreseen else None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_ours = frame.f_globals.get("__name__", "").split(".")[0] in ("dlr", "__main__")
    if isinstance(error, OSError) or isinstance(error, ValueError) and is_ours:
        return str(error) or type(error).__name__
    return None


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for variable in FOLDERS:             # kernels and sweeps run elsewhere; the caller's is meant
        if os.environ.get(variable):
            os.environ[variable] = str(Path(os.environ[variable]).expanduser().absolute())
    try:
        return arguments.call(arguments)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Stopped as stop:
        print(f"\nstopped as asked: {stop}", file=sys.stderr)
        return EXIT
    except Exception as error:
        sentence = _sentence(error)
        if arguments.debug or sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
