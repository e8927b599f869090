"""06: the settings of the notebook that times dense, truncated, masked and compact execution."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dlr.base.loading import BaseLoading
from dlr.settings import Count, Dtype, Local, MachineDecides, Seed, distinct
from dlr.workbook.phases import PhaseSettings, phase

Counts = Annotated[list[Count], Field(min_length=1), distinct()]
Skip = Annotated[float, Field(gt=0.0, le=1.0)]


@phase("06_latency")
class LatencyConfig(BaseLoading, PhaseSettings):
    """06: time of each way to execute, under the plan of a trained router."""
    toy: ClassVar = {"layers": 5, "lengths": [32], "context": 16, "decode_steps": 2, "repeats": 1,
                     "plan_docs": 2, "skips": [0.5]}
    data: ClassVar = "recorded plan"

    # the embedded model, or random weights in a published model's shapes
    shape: Literal["nano", "tinyllama-1.1b", "openllama-3b", "qwen2.5-3b", "qwen2.5-7b",
                   "llama3.1-8b"] = "nano"
    model: Local = ""                   # 'smollm2', a folder, a .gguf file or a Hub id; '': `shape`
    skip_adapter_rank: int = Field(0, ge=0)     # of the router that runs, random; 0: no adapters
    checkpoint: Local = ""              # whose router's plan is recorded; '': the embedded router
    layers: int = Field(0, ge=0)        # caps the depth to what memory holds; 0: the whole model
    # auto: bfloat16 where it is fast
    dtype: Annotated[Literal["auto"] | Dtype, MachineDecides()] = "auto"
    skips: Annotated[list[Skip], Field(min_length=1), distinct()] = [0.25, 0.4, 0.5]
    lengths: Counts = [512]                 # tokens of a prefill
    batches: Counts = [1]                   # sequences of a prefill
    context: int = Field(256, ge=1)         # tokens in the cache before decoding
    decode_batches: Counts = [1]
    decode_steps: int = Field(16, ge=1)     # steps a turn
    captured: bool = False      # also decodes by CUDA graphs, a layer each, beside a compiled model
    repeats: int = Field(9, ge=1)           # turns; medians and quartiles are taken over them
    plan_docs: int = Field(16, ge=1)        # test documents whose plan is recorded
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_model(self):
        if self.model and self.shape != "nano":
            raise ValueError(f"model={self.model!r} has weights of its own, so that "
                             f"shape={self.shape!r} has no effect. Give one of the two.")
        if self.shape != "nano" and self.load_in_4bit:
            raise ValueError("load_in_4bit packs a model's own weights, and those of "
                             f"shape={self.shape!r} are random. Give model instead of shape.")
        return self
