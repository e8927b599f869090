"""What training by several processes needs beside Trainer: each one's share, and sharded bases.

By default every process holds the whole model (DDP). With `shard` the decoder layers' weights are
spread over the processes (FSDP2), and gathered layer by layer as they run. The router stays whole
in each, since hooks all over the model read it, and it is small: its gradients are averaged here.
"""

import torch.distributed as dist

from dlr.processes import agreed, count
from dlr.routing.handle import Routing


def share_of_batch(size: int, processes: int) -> int:
    """Sequences of a batch that each process takes.

    Raises:
        ValueError: they cannot share it equally.
    """
    if size % processes:
        more = (size // processes + 1) * processes
        raise ValueError(f"batch_size={size} is the whole batch, which {processes} processes "
                         f"cannot share equally: set batch_size={more}, or start as many "
                         f"processes as divide {size}. accumulation takes several batches a step.")
    return size // processes


def begin_alike(routing: Routing) -> None:
    """Gives every process the first one's router, threshold and dial: rounding may differ."""
    if count() > 1:
        routing.router.load_weights(agreed(routing.router.weights()))
        routing.calibration = agreed(routing.calibration)


def shard(accelerator, routing: Routing) -> None:
    """Tells accelerate how to shard a routed model, before it does.

    Autocast alone decides on numbers, as it does without sharding: FSDP2's own policy would round
    states that the router and the residual stream have in float32.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None
    plugin.ignored_modules = [routing.router]
    routing.execution = "masked"         # a layer that one process leaves out is awaited by others


def average_gradients(module) -> None:
    """Averages a module's gradients over all processes; what is an average already stays so."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad.div_(count()))
