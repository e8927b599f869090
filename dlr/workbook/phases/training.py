"""01 to 04: the settings of the notebooks that train variants of one base model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dlr.routing.config import RouterConfig
from dlr.settings import Local, Ratio, distinct
from dlr.train.settings import RunConfig
from dlr.workbook.phases import PhaseSettings, phase

Dropped = Annotated[list[Ratio], distinct("{:.0%}")]


class NotebookConfig(RunConfig, PhaseSettings):
    """What the training notebooks share."""
    steps: int = Field(40, ge=1)
    eval_docs: int = Field(160, ge=1)


class FirstConfig(NotebookConfig):
    """What the first studies had: LoRA in every layer, no skip adapters, gates without a book."""
    router_class: str = "Router"
    router_hidden: int = Field(RouterConfig().router_hidden, ge=1, le=2**16)
    skip_adapter_rank: int = Field(0, ge=0, le=2**16)
    lora_prefix: bool = True
    warm_start: bool = False


@phase("01_baselines")
class BaselinesConfig(FirstConfig):
    """01: dense LoRA and stochastic depth."""
    toy: ClassVar = RunConfig.toy | {"dropped": [0.4]}
    retired: ClassVar = (*RunConfig.retired, "warm_start")      # there is no router to start

    layer_drop: float = Field(0.5, ge=0.0, lt=1.0)
    dropped: Dropped = [0.2, 0.4, 0.6]     # skip ratios at which stochastic depth is evaluated


@phase("02_sequence_routing")
class SequenceConfig(FirstConfig):
    """02: sequence-level routing under one global penalty, swept."""
    toy: ClassVar = RunConfig.toy | {"penalties": [1.0]}

    level: Literal["token", "sequence"] = "sequence"
    objective: str = "global_penalty"
    router_lr: float = Field(1e-2, gt=0.0)
    penalties: Annotated[list[Annotated[float, Field(ge=0.0)]], distinct("{:g}")] = [0.3, 1.0, 3.0]


@phase("03_token_routing")
class TokenConfig(NotebookConfig):
    """03: token-level routing, version by version."""
    variants: Annotated[list[str], distinct()] = [
        "v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"]


@phase("04_pareto")
class ParetoConfig(NotebookConfig):
    """04: the frontier of one seed: its router at every budget, or its baselines."""
    toy: ClassVar = RunConfig.toy | {"budgets": [0.4]}

    point: Literal["router", "baselines", "checkpoint", "summary"] = "summary"
    checkpoint: Local = ""                 # of point="checkpoint": what is measured, not trained
    elastic: bool = True
    budgets: Dropped = [0.2, 0.4, 0.6]     # skip ratios that are dialled and measured

    @model_validator(mode="after")
    def _measures_what_it_names(self):
        if (self.point == "checkpoint") != bool(self.checkpoint):
            raise ValueError("point='checkpoint' measures the checkpoint that is named: give both, "
                             "or neither.")
        return self
