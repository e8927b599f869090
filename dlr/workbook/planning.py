"""What a training phase will take, before anything is downloaded: memory, work, time, storage.

Memory and FLOPs of a step come from `dlr.train.rehearsal`; all else is counted from the settings.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig

from dlr.base.models import NANO_NAME
from dlr.measure.flops import flops_per_token
from dlr.measure.logits import ELEMENTS, MOST, SHARE
from dlr.measure.shapes import shape_of
from dlr.routing.book import depths_of
from dlr.routing.policy import LayerDrop, Policy
from dlr.runs import from_project
from dlr.settings import SettingsError
from dlr.train.rehearsal import Rehearsal, rehearse
from dlr.train.settings import RunConfig
from dlr.workbook.peers import PEERS, VERSIONS, of_variant

CONTEXT = 500_000_000       # bytes of an accelerator that its own libraries take
FRAGMENTS = 0.05            # share of the peak that lies in pieces too small to be used again
UTILISATION = 0.35          # share of a card's FLOPs that training reaches
SHORTEST = 256              # tokens below which no shorter sequence is proposed


class Card(NamedTuple):
    """An accelerator: bytes of memory, and dense bfloat16 FLOPs a second."""
    memory: float
    flops: float


CARDS = {"h200": Card(141e9, 989e12), "h100": Card(80e9, 989e12), "a100": Card(80e9, 312e12),
         "l40s": Card(48e9, 362e12), "l4": Card(24e9, 121e12), "rtx4090": Card(24e9, 165e12),
         "rtx3090": Card(24e9, 71e12), "rtx3060": Card(12e9, 25e12), "rtx4060": Card(8e9, 30e12)}
# Of data sets on the Hub: characters of the training split, and bytes to download.
TEXTS = {"wikitext-103-raw-v1": (540_000_000, 314_000_000),
         "wikitext-2-raw-v1": (10_900_000, 7_400_000)}
CHARACTERS = 4.3            # a token of English, in the vocabularies of published models


# -- which step, and how many of them -----------------------------------------------------------
def trainings(phase: str, config: RunConfig) -> int:
    """How many models a phase trains under these settings, each for `config.steps`."""
    if phase == "pareto":
        return 2 if config.point in ("router", "baselines") else 0
    if phase == "predecessor":
        return {"depth_router": 2, "base": 0, "summary": 0}.get(config.point, 1)
    counts = {"baselines": 2, "stages": 2, "depth_router": 0}
    if phase == "sequence_routing":
        return 1 + len(config.penalties)
    return len(config.variants) if phase == "token_routing" else counts.get(phase, 1)


def heaviest(phase: str, config: RunConfig) -> tuple[RunConfig, Policy | None]:
    """Settings and policy of the step that holds most, of all that a phase trains.

    A router that learns by gradients holds more than one that is regressed beforehand.
    """
    if phase == "token_routing":
        routed = [of_variant(config, name) for name in config.variants if name in VERSIONS | PEERS]
        config = max(routed, key=lambda each: (not each.warm_start, each.kd_weight > 0),
                     default=config)
    if phase == "stages":
        config = config.changed(router_share=config.learning_share)
    points = "baselines", "dense", "stochastic"
    controls = phase == "baselines" or getattr(config, "point", "") in points
    return config, LayerDrop(config.layer_drop or 0.5) if controls else None


def on_accelerator(config: RunConfig) -> RunConfig:
    """`config` with what an accelerator decides: bfloat16 by autocast, unless it is refused."""
    return config.changed(bf16=True) if config.bf16 is None else config


# -- the plan ----------------------------------------------------------------------------------
@dataclass
class Forecast:
    """What a phase takes.

    Attributes:
        step: of one process. memory: bytes it may take; None: nobody said.
        logits: of the whole batch of a pass, how many.
        trainings: how many models are trained. tokens: that one of them sees.
        preparation: kind of pass to the tokens it runs, in passes at full depth.
        validation: tokens that run at full depth in all trainings, at most.
        flops: of all training, preparation and validation, on all processes.
        downloads: what to bytes; None where nobody knows.
        epochs: times that one training sees the data set; None where its size is not known.
    """
    step: Rehearsal
    memory: float | None
    logits: int
    trainings: int
    tokens: int
    preparation: dict[str, float]
    validation: float
    flops: float
    downloads: dict[str, float | None]
    epochs: float | None

    @property
    def margin(self) -> float:
        return CONTEXT + FRAGMENTS * self.step.peak.total()

    @property
    def needed(self) -> float:
        """Bytes of an accelerator, at the least."""
        return self.step.peak.total() + self.margin

    @property
    def for_speed(self) -> float:
        """About how many bytes more are taken where they are free: for larger chunks of logits."""
        if self.memory is None or not self.fits:
            return 0
        free = self.memory - self.needed + self.step.peak["logits and KD"]
        chunk = min(max(ELEMENTS, free / SHARE), MOST, self.logits)
        return self.step.peak["logits and KD"] * max(0, chunk / min(ELEMENTS, self.logits) - 1)

    @property
    def fits(self) -> bool:
        return self.memory is None or self.needed <= self.memory

    @property
    def checkpoint(self) -> dict[str, float]:
        """Bytes of a checkpoint: what is kept, and while it is trained."""
        held = Counter({part: 4 * self.step.parameters[part]
                        for part in ("LoRA", "router", "skip adapters")})
        kept = held.total()
        return {"kept": kept, "while it is trained": kept + self.step.peak["optimizer"]}


def forecast(phase: str, config: RunConfig, processes: int = 1,
             memory: float | None = None) -> Forecast:
    """What `phase` takes under `config`.

    Raises:
        SettingsError: `batch_size` cannot be divided by the processes.
        ConnectionError: the model's shape is not known, see `shapes.shape_of`.
    """
    config = on_accelerator(config)
    shape = shape_of(config.model)
    step = step_of(phase, config, shape, processes)
    count = trainings(phase, config)
    passes = config.steps * config.accumulation
    tokens = passes * config.batch_size * config.seq_len
    preparation = prepared_tokens(phase, config, shape)
    dense = flops_per_token(shape, shape.num_hidden_layers, config.seq_len / 2)
    validation = count * validated_tokens(config)
    flops = (sum(preparation.values()) + validation) * dense
    flops += count * passes * processes * step.flops
    characters, _ = TEXTS.get("" if config.lines else config.dataset, (None, None))
    epochs = characters and tokens / (characters / CHARACTERS)
    logits = config.batch_size // processes * config.seq_len * shape.vocab_size
    return Forecast(step, memory, logits, count, tokens, preparation, validation, flops,
                    downloads_of(config, step), epochs)


def step_of(phase: str, config: RunConfig, shape: PretrainedConfig,
            processes: int = 1) -> Rehearsal:
    """The heaviest step of a phase; of one that trains nothing, its largest pass."""
    if config.batch_size % processes:
        raise SettingsError(f"batch_size={config.batch_size} is the whole batch of a pass, and "
                            f"{processes} processes cannot share it alike: give a multiple of "
                            f"{processes}.")
    config, policy = heaviest(phase, config)
    if trainings(phase, config):
        step = rehearse(shape, config, policy, processes)
        if config.shard and processes > 1:          # its layers' part, and two gathered to run
            step.peak["base"] *= min(1, 1 / processes + 2 / shape.num_hidden_layers)
        return step
    rows = max(2 * config.batch_size * config.eval_len, config.label_batch) // config.seq_len
    passed = config.changed(batch_size=max(1, rows))
    return rehearse(shape, passed, policy, trains=False)


def prepared_tokens(phase: str, config: RunConfig, shape: PretrainedConfig) -> dict[str, float]:
    """Tokens that run before the training, in passes at full depth, by what they are read for."""
    depth = shape.num_hidden_layers
    per_layer = 2 if config.unit == "sublayer" else 1
    units = per_layer * (depth - config.always_keep - config.keep_last)
    if not config.is_prepared and "best static" not in getattr(config, "variants", ()):
        return {}
    tried = [units] + [min(units - place, config.candidates) for place in range(1, units)]
    searched = sum(count * (1 - (place + 1) / (per_layer * depth))
                   for place, count in enumerate(tried))
    learns = config.warm_start and not heaviest(phase, config)[1]
    found = {"skip adapters": config.adapter_tokens * bool(config.skip_adapter_rank),
             "static order": config.order_tokens * searched}
    dropped = depths_of(units, config.book_plans, config.book_depth)
    if config.reads_book and learns:
        found["labels"] = config.label_tokens * sum(
            1 - count / (per_layer * depth) for count in dropped)
        found["labels in context"] = 2 * config.context_tokens
    return {name: tokens for name, tokens in found.items() if tokens}


def validated_tokens(config: RunConfig) -> int:
    """Tokens of held-out text that one training runs, where no document is short."""
    times = -(-config.steps // config.eval_steps) if config.eval_steps else 0
    return times * config.validation_docs * config.eval_len


def downloads_of(config: RunConfig, step: Rehearsal) -> dict[str, float | None]:
    """What a phase fetches from the network, and its bytes; None: nobody knows."""
    found = {}
    if config.model == "smollm2":
        found["smollm2, once"] = 93_000_000
    elif config.model not in ("nano", NANO_NAME) and not from_project(config.model).exists():
        base = sum(step.parameters[part] for part in ("base", "rest"))
        cached = any(isinstance(try_to_load_from_cache(config.model, name), (str, os.PathLike))
                     for name in ("model.safetensors", "model.safetensors.index.json"))
        found[config.model] = 0 if cached else 2 * base
    if config.dataset != "embedded" and not from_project(config.dataset).exists():
        found[config.dataset] = TEXTS.get(config.dataset, (None, None))[1]
    return found


# -- where it does not fit ----------------------------------------------------------------------
def remedy(phase: str, config: RunConfig, processes: int, memory: float) -> dict | None:
    """The first settings to change, in their order, with which a phase fits; None: none suffice."""
    changes = {}
    for change in _proposals(config, processes):
        changes |= change
        tried = config.changed(**changes)
        if forecast(phase, tried, processes, memory).fits:
            return changes
    return None


def _proposals(config: RunConfig, processes: int):
    """Changes of settings, the cheapest in quality and time first."""
    if not config.gradient_checkpointing and config.unit != "sublayer":
        yield {"gradient_checkpointing": True}
    if config.batch_size > processes:
        yield {"batch_size": processes,
               "accumulation": config.accumulation * config.batch_size // processes}
    length = config.seq_len
    while length // 2 >= SHORTEST:
        length //= 2
        yield {"seq_len": length, "eval_len": min(length, config.eval_len)}
    if not config.load_in_4bit:
        yield {"load_in_4bit": True}
