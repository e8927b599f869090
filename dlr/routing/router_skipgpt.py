"""SkipGPT: attention and MLP are gated apart, each by a linear map of what it is given.

Zhao et al. 2025, "SkipGPT: Dynamic Layer Pruning Reinvented with Token Awareness and Module
Decoupling". The budget is one for all tokens, layers and halves of layers
(`objective="global_target"`); gates are drawn by Gumbel-softmax, straight through. It wants
`unit="sublayer"`.

Simplified: one logit stands for two; gates and LoRA are trained together, where SkipGPT first
trains the gates alone on frozen weights; the threshold is calibrated on held-out text after
training. No skip adapter stands in for half a layer, so that this rule runs without any.
"""

from dlr.routing.router_layers import LayerRouter


class SkipGPTRouter(LayerRouter):
    """One linear map a unit; it reads the module's input, which is the normed residual stream."""
