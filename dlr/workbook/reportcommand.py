"""`python -m dlr report`: one document of everything that `results/` holds.

What takes seconds to import is imported by the command itself, as in `evalcommand`.
"""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  python -m dlr report                                    results/report/report.html and .pdf
  python -m dlr report --results ~/other-results --out ~/report
  python -m dlr report --no-pdf

Beside the page lie its tables for LaTeX (booktabs), in tables/. report.pdf is printed by a browser
(chromium, chrome or edge) where one is at hand.
"""


def add_parser(commands) -> None:
    """The `report` command's arguments."""
    command = commands.add_parser("report", epilog=EXAMPLES,
                                  help="write one document of everything in results/",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--results", type=Path, metavar="DIR",
                         help="results folder (default: results/, or that of DLR_RESULTS)")
    command.add_argument("--out", type=Path, metavar="DIR",
                         help="folder to write to (default: report/ in the results folder)")
    command.add_argument("--no-pdf", action="store_true", help="write the page alone")


def report_command(arguments) -> int:
    """Writes the report and says where; 0 when it is there."""
    from dlr.workbook.report.page import write_report
    write_report(arguments.results, arguments.out, pdf=not arguments.no_pdf)
    return 0
