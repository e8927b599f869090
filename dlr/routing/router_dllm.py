"""D-LLM: before each layer a small network reads the current state and decides whether to run it.

Jiang et al. 2024, "D-LLM: A Token Adaptive Computing Resource Allocation Strategy for Large
Language Models" (NeurIPS 2024). Gates are drawn by Gumbel-softmax, straight through, and each token
is held to the target ratio by an L1 term: `objective="token_target"`.

Simplified: the network is that of all routers here, with one logit for two; a skipped token passes
the skip adapter; it leaves keys and values, which D-LLM evicts (kv='drop' is nearer to the paper);
the threshold is calibrated on held-out text after training, as for all routers here.
"""

from dlr.routing.config import RouterConfig
from dlr.routing.router import network
from dlr.routing.router_layers import LayerRouter


class DLLMRouter(LayerRouter):
    """Three linear layers with GELU between, a unit."""

    def gate_network(self, config: RouterConfig):
        return network(self.width, config.router_hidden, 1)
