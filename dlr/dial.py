"""The budget dial: another skip ratio at inference, without training or calibrating again.

    with dlr.budget(model, skip=0.3):
        model.generate(...)
"""

import contextlib

from dlr.calibration import threshold_at
from dlr.routed import routing_of


@contextlib.contextmanager
def budget(model, skip: float):
    """Moves the router's threshold along its calibration curve for the duration; yields the routing handle.

    Args:
        skip: skip ratio asked for, 0 to 0.8. 0 keeps every layer.

    Raises:
        NotRoutable: no router is attached; ValueError: `skip` is outside the dial, or the router was never calibrated.
    """
    routing = routing_of(model)
    before, routing.config.threshold = routing.config.threshold, threshold_at(routing.config.curve, skip)
    outer, routing.calibrated_threshold = getattr(routing, "calibrated_threshold", None), before
    if outer is not None:
        routing.calibrated_threshold = outer
    try:
        yield routing
    finally:
        routing.config.threshold, routing.calibrated_threshold = before, outer
