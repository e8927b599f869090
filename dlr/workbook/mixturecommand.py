"""`python -m dlr mixture DATA_DIR OUT`: a dataset of five domains, from public files.

What takes seconds to import is imported by the command itself, as in `evalcommand`.
"""

import argparse

EXAMPLES = """examples:
  python -m dlr mixture ~/public-data ~/mixture
  python -m dlr mixture ~/public-data ~/small-mixture --per-domain 100
  python -m dlr run token_routing --set dataset=~/mixture --set model=smollm2

DATA_DIR holds, as their repositories have them: enwiki-extract/*/wiki_* (English Wikipedia by
WikiExtractor), tinystories/*.txt (TinyStories; files with 'lowercase' or 'valid' in their names are
left out), gsm8k/train.jsonl and classic-books-children/<author>/<title>.md. Python source is this
interpreter's own.

Domains of your own: any folder of <domain>/documents.jsonl is such a dataset. A line is a record
with a text and, where several records are of one book or file, the group that holds them.
"""


def add_parser(commands) -> None:
    """The `mixture` command's arguments."""
    command = commands.add_parser("mixture", epilog=EXAMPLES,
                                  help="prepare a dataset of five domains from public files",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("data_dir", metavar="DATA_DIR", help="folder of public data files")
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument("--per-domain", type=int, default=1500, metavar="N",
                         help="documents a domain, where it has as many (default 1500)")


def mixture_command(arguments) -> int:
    """Writes the mixture and prints how many documents each split has; 0 when it is there."""
    from dlr.base.sources import write_mixture
    table = write_mixture(arguments.data_dir, arguments.out, arguments.per_domain)
    print(f"{table.to_string()}\n{arguments.out}: where it comes from is in SOURCES.md")
    return 0
