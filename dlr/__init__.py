"""Dynamic Layer Routing: input-conditional depth for pretrained causal language models."""

from dlr.checkpoint import from_pretrained, save_pretrained
from dlr.config import RouterConfig, RunConfig
from dlr.dial import budget
from dlr.plan import Plan
from dlr.routed import NotRoutable, attach, routing_of

__all__ = ["NotRoutable", "Plan", "RouterConfig", "RunConfig", "attach", "budget", "from_pretrained", "routing_of",
           "save_pretrained"]
