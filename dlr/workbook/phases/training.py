"""01 to 04: the settings of the notebooks that train variants of one base model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dlr.settings import Ratio, distinct
from dlr.train.settings import RunConfig
from dlr.workbook.phases import PhaseSettings, phase

Dropped = Annotated[list[Ratio], distinct("{:.0%}")]


class NotebookConfig(RunConfig, PhaseSettings):
    """What the training notebooks share."""
    steps: int = Field(40, ge=1)
    eval_docs: int = Field(160, ge=1)


@phase("01_baselines")
class BaselinesConfig(NotebookConfig):
    """01: dense LoRA and stochastic depth."""
    toy: ClassVar = RunConfig.toy | {"dropped": [0.4]}

    layer_drop: float = Field(0.5, ge=0.0, lt=1.0)
    dropped: Dropped = [0.2, 0.4, 0.6]     # skip ratios at which stochastic depth is evaluated


@phase("02_sequence_routing")
class SequenceConfig(NotebookConfig):
    """02: sequence-level routing under one global penalty, swept."""
    toy: ClassVar = RunConfig.toy | {"penalties": [1.0]}

    level: Literal["token", "sequence"] = "sequence"
    objective: str = "global_penalty"
    warm_start: bool = False
    router_lr: float = Field(1e-2, gt=0.0)
    penalties: Annotated[list[Annotated[float, Field(ge=0.0)]], distinct("{:g}")] = [0.3, 1.0, 3.0]


@phase("03_token_routing")
class TokenConfig(NotebookConfig):
    """03: token-level routing, version by version."""
    variants: Annotated[list[str], distinct()] = [
        "v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"]


@phase("04_pareto")
class ParetoConfig(NotebookConfig):
    """04: one point of the frontier, the router beside its controls, or the baselines of a seed."""
    toy: ClassVar = RunConfig.toy | {"dropped": [0.4]}

    point: Literal["router", "baselines", "summary"] = "summary"
    dropped: Dropped = [0.2, 0.4, 0.6]
