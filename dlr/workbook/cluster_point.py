"""What a cluster is given. Only this file needs submitit to be imported."""

import os

from submitit.helpers import Checkpointable

from dlr.workbook.phase_run import run_point


class Point(Checkpointable):
    """A point of a sweep. Stopped by a signal, it is queued again with the same arguments.

    It then goes on from its last checkpoint. Names and numbers alone are pickled.
    """

    def __call__(self, phase: str, name: str, parameters: dict, environment: dict) -> None:
        os.environ |= environment
        run_point(phase, name, parameters)
