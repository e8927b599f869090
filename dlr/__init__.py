"""Dynamic Layer Routing: input-conditional depth for pretrained causal language models."""

from dlr.routing.packed import silence_missing_kernel

silence_missing_kernel()                # before anything imports bitsandbytes

from dlr.base.checkpoint import save_pretrained  # noqa: E402
from dlr.base.opened import load  # noqa: E402
from dlr.base.restore import from_pretrained  # noqa: E402
from dlr.measure.evaluate import calibrate  # noqa: E402
from dlr.routing.attach import attach  # noqa: E402
from dlr.routing.budget import budget  # noqa: E402
from dlr.routing.config import RouterConfig  # noqa: E402
from dlr.routing.decoder import NotRoutable, routing_of  # noqa: E402
from dlr.routing.plan import Plan  # noqa: E402
from dlr.routing.policy import StaticPlan  # noqa: E402

__all__ = ["NotRoutable", "Plan", "RouterConfig", "StaticPlan", "attach", "budget", "calibrate",
           "from_pretrained", "load", "routing_of", "save_pretrained"]
