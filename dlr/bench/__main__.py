"""lm-evaluation-harness's own command line, with DLR checkpoints as `--model dlr`.

    python -m dlr.bench run --model dlr --model_args checkpoint=nano-router --tasks blimp
    accelerate launch --multi_gpu --num_processes 8 -m dlr.bench run --model dlr ...

Data sets come from the hub here; `python -m dlr eval` also takes local files (--data-dir). What the
scored tokens skipped is in the result's "config" (dlr_skip ...).
"""

import sys

from lm_eval.__main__ import cli_evaluate

import dlr.bench.harness  # noqa: F401  (registers the model)
from dlr.base.restore import WrongBase
from dlr.settings import SettingsError


def main() -> None:
    if any(argument.split("=")[0] in ("--use_cache", "--use-cache") for argument in sys.argv):
        sys.exit("error: --use_cache answers requests from a store that does not know which model "
                 "or plan filled it, so a routed model could be given a dense one's scores; leave "
                 "it out. `python -m dlr eval` keeps finished tasks.")
    try:
        cli_evaluate()
    except (SettingsError, WrongBase) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
