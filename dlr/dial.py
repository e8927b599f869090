"""The budget dial: another skip ratio at inference, without training or calibrating again.

    with dlr.budget(model, skip=0.3):
        model.generate(...)
"""

import contextlib

from dlr.calibration import threshold_at
from dlr.routed import routing_of


@contextlib.contextmanager
def budget(model, skip: float):
    """Moves the router's threshold along its calibration curve for the duration, in this thread; yields the routing handle.

    `routing.threshold` is the threshold in force; `routing.calibration.threshold`, which `save_pretrained` writes, stays.

    Args:
        skip: skip ratio asked for, 0 to 0.8. 0 keeps every layer.

    Raises:
        NotRoutable: no router is attached; ValueError: `skip` is outside the dial, or the router was never calibrated.
    """
    routing = routing_of(model)
    with routing.at(threshold=threshold_at(routing.calibration.curve, skip)):
        yield routing
