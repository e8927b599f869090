"""What the controls' LoRA is trained under: a static plan, stochastic depth."""

from dlr.routing.elastic import ElasticStatic
from dlr.routing.plan import static_pair
from dlr.routing.policy import LayerDrop, MixedStaticPlan, Policy
from dlr.train.objectives import OBJECTIVES
from dlr.train.settings import RunConfig


def static_policy(config: RunConfig, order: list[int], skip: float, forced: float) -> Policy:
    """Static plans along `order` that skip `skip`, or what each sequence draws (elastic).

    Args:
        forced: the share of tokens that run every layer all the same.
    """
    if config.elastic:
        return ElasticStatic(order)
    return MixedStaticPlan(*static_pair(order, len(order), skip, forced))


def meets_target(config: RunConfig) -> bool:
    """Whether routers under `config` are calibrated to skip `target_skip`."""
    return OBJECTIVES[config.objective].calibrates


def stochastic_policy(config: RunConfig) -> LayerDrop:
    """Stochastic depth.

    Raises:
        ValueError: `config.layer_drop` is 0, so that no depth is stochastic.
    """
    if config.layer_drop == 0:
        raise ValueError("Stochastic depth drops layers in training: give layer_drop above 0 "
                         "(0.5, say).")
    return LayerDrop(config.layer_drop, config.drop_schedule, config.drop_level)
