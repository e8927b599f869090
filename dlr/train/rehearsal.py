"""A training step in rehearsal: of a model that is not there, for its peak memory and its FLOPs.

The model is built from a configuration alone, of fake tensors, and takes one step as the trainer
takes it: the frozen teacher's pass, the student's under its plan, head and losses in chunks, the
backward pass. What is counted is what tensors hold. A device needs more, see
`dlr.workbook.planning`.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from dlr.base.models import NF4, add_lora
from dlr.measure.storages import Storages, make_fake
from dlr.routing.attach import attach
from dlr.routing.budget import DIAL
from dlr.routing.elastic import ElasticRouter
from dlr.routing.handle import Routing
from dlr.routing.policy import Policy, RouterPolicy
from dlr.routing.router import ROUTER_NAME
from dlr.train.losses import losses
from dlr.train.objectives import OBJECTIVES, Objective
from dlr.train.settings import RunConfig
from dlr.train.trainer import DLRTrainer

PARTS = ("base", "rest", "LoRA", "router", "skip adapters", "optimizer", "gradients",
         "activations", "logits and KD")
BLOCK, OF_SCALES = 64, 256        # weights that share a scale in 4 bit, and scales that share one


def part_of(name: str, tensor: torch.Tensor) -> str:
    """What a parameter or buffer of a routed PEFT model belongs to."""
    if ROUTER_NAME in name:
        return "skip adapters" if f"{ROUTER_NAME}.skip." in name else "router"
    if "lora_" in name:
        return "LoRA"
    return "base" if ".layers." in name and tensor.ndim > 1 else "rest"


# -- the model ---------------------------------------------------------------------------------
def empty_model(shape: PretrainedConfig, config: RunConfig):
    """(model, its routing), without data: a base of `shape` with LoRA and router of `config`."""
    attention = "eager" if config.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype),
                                                attn_implementation=attention)
        if config.load_in_4bit:
            _pack(base, getattr(torch, config.dtype))
        model = add_lora(base.requires_grad_(False), rank=config.lora_rank,
                         alpha=config.lora_alpha, dropout=config.lora_dropout, seed=config.seed,
                         first=0 if config.lora_prefix else config.always_keep,
                         targets=config.lora_targets)
    routing = attach(model, config.router(), bf16=config.autocast)
    routing.calibration.curve = [0.0] * len(DIAL)            # an elastic policy asks for prices
    return model, routing


def _pack(base: nn.Module, dtype: torch.dtype) -> None:
    """Puts 4-bit layers without data into `base`, as loading would: NF4 with packed scales."""
    from bitsandbytes.functional import QuantState          # only 4-bit models need the library
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert
    replace_with_bnb_linear(base, get_keys_to_not_convert(base), BitsAndBytesConfig(**NF4))
    base.is_loaded_in_4bit = True
    for module in base.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        shape = module.weight.shape
        scales = -(-shape.numel() // BLOCK)
        weight = nn.Parameter(torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), False)
        weight.compress_statistics, weight.quant_type = True, "nf4"
        above = QuantState(torch.empty(-(-scales // OF_SCALES)), code=torch.empty(256),
                           blocksize=OF_SCALES, dtype=torch.float32)
        weight.quant_state = QuantState(
            torch.empty(scales, dtype=torch.uint8), shape=shape, code=torch.empty(16),
            blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=above)
        module.weight = weight


def tensors_of(model: nn.Module):
    """(part, tensor) of parameters, buffers and what 4-bit weights are scaled by."""
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        part = part_of(name, tensor)
        yield part, tensor
        state = getattr(tensor, "quant_state", None)
        for each in (state, getattr(state, "state2", None)):
            yield from ((part, scale) for scale in vars(each or object).values()
                        if isinstance(scale, torch.Tensor))


def sizes_of(model: nn.Module) -> tuple[Counter, Counter]:
    """(numbers of parameters, bytes with buffers and scales), by part."""
    numbers, held = Counter(), Counter()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        numbers[part_of(name, parameter)] += state.shape.numel() if state else parameter.numel()
    for part, tensor in tensors_of(model):
        held[part] += tensor.nbytes
    return numbers, held


# -- the step ----------------------------------------------------------------------------------
def policy_of(config: RunConfig) -> Policy:
    """The router's own policy in its first step, as the trainer has it."""
    kind = ElasticRouter if config.elastic else RouterPolicy
    steps = OBJECTIVES[config.objective](config).router_steps
    return kind(training=steps > 0, temperature=config.gumbel_start, noise=config.gumbel_noise)


class Stages:
    """Hooks that tell a count which layer runs, forward or backward.

    The first layers are told apart by their place from below, all others by that from above: what
    happens in one of these is the same in every model that is deep enough, but for the number of
    layers around it.
    """

    def __init__(self, count: Storages, routing: Routing):
        self.count, self.depth, self.below = count, len(routing.layers), routing.first + 1
        self.handles = [routing.decoder.register_forward_hook(self._ended)]
        for place, layer in enumerate(routing.layers):
            self.handles += [layer.register_forward_pre_hook(self._begun(place)),
                             layer.register_forward_hook(self._backward(place))]

    def _enter(self, kind: str, place: int) -> None:
        self.count.part = "activations"
        self.count.stage = kind, place if place < self.below else place - self.depth

    def _begun(self, place: int):
        def hook(module, args):
            self._enter("student" if torch.is_grad_enabled() else "teacher", place)
        return hook

    def _backward(self, place: int):
        def hook(module, args, output):
            state = output[0] if isinstance(output, (tuple, list)) else output
            if state.requires_grad:
                state.register_hook(lambda gradient: self._enter("backward", place))
        return hook

    def _ended(self, module, args, output):
        self.count.part, self.count.stage = "logits and KD", ("head", 0)


def step(model, routing: Routing, config: RunConfig, policy: Policy | None = None,
         processes: int = 1, trains: bool = True, mode=None) -> Storages:
    """One training step of real or fake tensors; returns the count of it.

    Args:
        policy: that LoRA is trained under; None: the router's own.
        processes: that share the batch; each also holds what they exchange of its gradients.
        trains: False: the two passes and their losses alone, without gradients.
        mode: of the model's fake tensors; None: they are real.
    """
    objective = (Objective if policy else OBJECTIVES[config.objective])(config)
    model.train()                                             # without gradients too: masked
    if config.autocast:                                       # as accelerate wraps it
        model.forward = convert_outputs_to_fp32(
            torch.autocast("cpu", torch.bfloat16)(model.forward))
    trained = _made_ready(model, config, policy) if trains else []
    policy = policy or policy_of(config)
    ids = torch.zeros(max(1, config.batch_size // processes), config.seq_len, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = Storages()
    for part, tensor in tensors_of(model):
        count.hold(tensor, part)
    with mode or nullcontext(), count, torch.set_grad_enabled(trains):
        kept = _kept_between_steps(trained, count, config.accumulation > 1, processes > 1)
        Stages(count, routing)
        with routing.autocast():
            ce, kd = losses(model, routing, inputs, policy,
                            config.kd_temperature if config.kd_weight else None)
        kd = ce * 0 if kd is None else kd
        loss = (1 - config.kd_weight) * ce.mean() + config.kd_weight * kd.mean()
        loss = loss + objective.term(routing.plan)
        if trains:
            loss.backward()
        del kept
    return count


def _made_ready(model, config: RunConfig, policy: Policy | None) -> list[nn.Parameter]:
    """Readies `model` as the trainer does; returns the parameters that get gradients."""
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False})
    trainer = SimpleNamespace(config=config, learns_routing=policy is None)
    optimizer = DLRTrainer.create_optimizer(trainer, model)
    if policy is None and not policy_of(config).training:        # no gradient reaches its network
        optimizer.param_groups = optimizer.param_groups[:1]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kept_between_steps(trained: list[nn.Parameter], count: Storages, accumulates: bool,
                        exchanges: bool) -> list[torch.Tensor]:
    """What AdamW remembers, and gradients that are there before a pass begins."""
    def new(part: str) -> list[torch.Tensor]:
        count.part = part
        return [torch.zeros_like(parameter) for parameter in trained]

    kept = [*new("optimizer"), *new("optimizer"), *(new("gradients") if exchanges else ())]
    gradients = new("gradients") if accumulates else [None] * len(trained)
    for parameter, gradient in zip(trained, gradients):
        parameter.grad = gradient
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: count.hold(parameter.grad, "gradients"))
    count.part = "activations"
    return kept


# -- a step of a whole model -------------------------------------------------------------------
@dataclass
class Rehearsal:
    """What one training step takes of one process.

    Attributes:
        parameters: numbers of them, by part. peak: bytes at the highest point, by part.
        flops: of one pass forward and backward, of the sequences of one process.
    """
    parameters: Counter
    peak: Counter
    flops: float


def rehearse(shape: PretrainedConfig, config: RunConfig, policy: Policy | None = None,
             processes: int = 1, trains: bool = True, whole: bool = False) -> Rehearsal:
    """One step of `config` on a model of `shape`.

    Two models of few layers take the step; all that it holds is affine in the number of layers, by
    stage, so that the whole model's follows; a book of more plans adds a few kilobytes a token.
    `whole` has the whole model take it. Logits are made in the smallest chunks; an accelerator
    takes larger ones where memory is free.

    Args:
        policy, processes, trains: as of `step`.
    """
    model, routing = empty_model(shape, config)
    numbers, static = sizes_of(model)
    depth, least = len(routing.layers), routing.first + routing.config.keep_last + 2

    def counted(model, routing) -> Storages:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return step(make_fake(model, mode), routing, config, policy, processes, trains, mode)

    if whole or depth <= least + 1 or len(set(getattr(shape, "layer_types", None) or [0])) > 1:
        count = counted(model, routing)
        return Rehearsal(numbers, count.peak, count.flops)
    small = []
    for layers in (least, least + 1):
        cut = empty_model(with_layers(shape, layers), config)
        _, own = sizes_of(cut[0])
        small.append((counted(*cut), own))
    return _extended(*small, depth - least, numbers, static)


def with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of a model of as many layers."""
    changed = type(shape).from_dict(shape.to_dict())
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


def _extended(fewer: tuple, more: tuple, steps: int, numbers: Counter,
              static: Counter) -> Rehearsal:
    """The whole model's rehearsal, from those of a model of few layers and of one more.

    What stays is counted on the whole model; what a step adds grows by the same from layer to
    layer.
    """
    (first, first_static), (second, second_static) = fewer, more

    def grown(before: Counter, after: Counter) -> Counter:
        added = {part: before[part] - first_static[part] for part in before}
        further = {part: after[part] - second_static[part] for part in after}
        return Counter({part: static[part] + added.get(part, 0)
                        + steps * (further.get(part, 0) - added.get(part, 0))
                        for part in static.keys() | added.keys() | further.keys()})

    peaks = [grown(first.peaks[stage], second.peaks[stage])
             for stage in first.peaks.keys() & second.peaks.keys()]
    return Rehearsal(numbers, max(peaks, key=Counter.total),
                     first.flops + steps * (second.flops - first.flops))
