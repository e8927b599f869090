"""Draws the figures of results/ as PNG and PDF: `python -m dlr.figures --help`."""

import argparse
import sys
from pathlib import Path

from dlr.figures.register import chosen, missing, redraw
from dlr.runs import shown_path

EXAMPLES = """examples:
  python -m dlr.figures                                   every figure, into figures/
  python -m dlr.figures --only pareto_frontier            one of them
  python -m dlr.figures --results other --out pictures    of another folder of results
  python -m dlr.figures results/token_analysis/nano       one run's figures, into its folder
  python -m dlr.figures --list                            names, files they read, what makes them
"""


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        "python -m dlr.figures", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw every figure from results/ alone, as PNG and PDF; no model runs.")
    command.add_argument("run", nargs="?", type=Path,
                         help="a finished run's folder: draw its figures alone, into it")
    command.add_argument("--only", metavar="NAME", help="draw one figure; --list has the names")
    command.add_argument("--results", type=Path, metavar="DIR",
                         help="folder of results (default: results/, or DLR_RESULTS)")
    command.add_argument("--out", type=Path, metavar="DIR",
                         help="where the pictures go (default: figures/, or the run's folder)")
    command.add_argument("--list", action="store_true",
                         help="name every figure and what makes its data; draw nothing")
    return command


def listed(figures) -> None:
    for entry in figures:
        print(f"{entry.name}: {entry.title}")
        print(f"    reads {', '.join(entry.sources)}\n    made by {entry.command}")
        if entry.replaces:
            print(f"    stands for {', '.join(entry.replaces)}")


def main(argv: list[str] | None = None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.run and arguments.results:
        command.error("a run's folder holds its own results; leave --results out, or the run")
    if arguments.results and not arguments.results.is_dir():
        command.error(f"--results {arguments.results} is no folder; give one that holds "
                      "<phase>/<run>/metrics.json")
    try:
        figures = chosen(arguments.only)
    except ValueError as error:
        command.error(str(error))
    if arguments.list:
        listed(figures)
        return 0
    try:
        paths = redraw(arguments.run, arguments.out, only=arguments.only, results=arguments.results)
    except OSError as error:
        command.error(str(error))
    for path in paths:
        print(shown_path(path))
    absent = [] if arguments.run else missing(arguments.only, arguments.results)
    if absent:
        print("\nNot drawn, for want of data; what makes it:")
    for entry in absent:
        print(f"  {entry.name}: {entry.command}")
    return 1 if arguments.only and not paths else 0


if __name__ == "__main__":
    sys.exit(main())
