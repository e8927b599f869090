"""Dynamic Layer Routing: input-conditional depth for pretrained causal language models."""

from dlr.packed import silence_missing_kernel

silence_missing_kernel()                # before anything imports bitsandbytes

from dlr.checkpoint import save_pretrained  # noqa: E402
from dlr.router_config import RouterConfig  # noqa: E402
from dlr.calibration import budget  # noqa: E402
from dlr.evaluate import calibrate  # noqa: E402
from dlr.opened import load  # noqa: E402
from dlr.plan import Plan  # noqa: E402
from dlr.policy import StaticPlan  # noqa: E402
from dlr.restore import from_pretrained  # noqa: E402
from dlr.routed import NotRoutable, attach, routing_of  # noqa: E402

__all__ = ["NotRoutable", "Plan", "RouterConfig", "StaticPlan", "attach", "budget", "calibrate",
           "from_pretrained", "load", "routing_of", "save_pretrained"]
