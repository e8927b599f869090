"""lm-evaluation-harness's own command line, with DLR checkpoints as `--model dlr`.

    python -m dlr.lm_eval run --model dlr --model_args checkpoint=nano-router --tasks blimp --limit 20
    python -m dlr.lm_eval run --model dlr --model_args checkpoint=nano --tasks arc_challenge --num_fewshot 5

Data sets come from the hub here; `python -m dlr eval` also takes local files (--data-dir).
"""

from lm_eval.__main__ import cli_evaluate

import dlr.harness  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
