"""11: the predecessor's protocol: its data, optimizer, rows and both of its averages."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dlr.settings import Named, Seed, distinct
from dlr.train.settings import RunConfig
from dlr.workbook.phases import phase
from dlr.workbook.phases.training import Dropped, NotebookConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# In what the settings of a point differ from those of the predecessor's router, which are the
# defaults below. Our own rows learn from text alone, as the dense one does.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"lora_targets": ATTENTION, "kd_weight": 0.0},
    "stochastic": {"lora_targets": ATTENTION, "drop_level": "batch"},
    "depth_router": {"router_class": "DepthRouter", "router_hidden": 512, "skip_adapter_rank": 64,
                     "warm_start": True, "lora_prefix": False, "objective": "controlled",
                     "kd_weight": 0.0, "target_skip": 0.18}}
# Sum of the weights of cross-entropy and distillation in the predecessor's loss, a position: its
# divergence is a sum over 128 positions, times 0.2. Here they add up to 1.
WHOLE = 1 + 0.2 * 128


@phase("11_predecessor")
class PredecessorConfig(NotebookConfig):
    """A row of the predecessor's table, or one that it lacks; `point` says which."""
    toy: ClassVar = RunConfig.toy | {"lines": 40, "seq_len": 16, "eval_len": 16, "budgets": [0.4]}

    # 'router' is the predecessor's; 'depth_router' is ours, beside the best static plan
    point: Literal["base", "dense", "stochastic", "router", "depth_router", "summary"] = "summary"
    model: Named = "HuggingFaceTB/SmolLM2-135M"
    dataset: Named = "wikitext-103-raw-v1"      # or a folder with one train* and one valid* file
    lines: int = Field(300, ge=1)               # of training text, of more than 100 characters
    seq_len: int = Field(128, ge=8)
    eval_len: int = Field(128, ge=8)
    eval_steps: int = Field(0, ge=0)            # the blocks that are held out calibrate
    calibration_docs: int = Field(50, ge=1)     # blocks at the end of the lines, held out
    eval_docs: int = Field(50, ge=1)            # paragraphs of the validation text
    # layers that fixed plans leave out, under which dense and stochastic weights are measured
    masks: Annotated[list[Annotated[list[int], Field(min_length=1)]], distinct()] = []
    budgets: Dropped = [0.18, 0.24]     # where a depth router is measured, beside target_skip

    keep_first_tokens: int = Field(0, ge=0, lt=2**31)
    keep_bias: float = 0.847                    # the logit of 0.7
    router_class: str = "PlainRouter"
    skip_adapter_rank: int = Field(0, ge=0, le=2**16)
    warm_start: bool = False
    gumbel_noise: float = Field(0.0, ge=0.0)
    gumbel_end: float = Field(1.0, gt=0.0)
    target_skip: float = Field(0.3, ge=0.0, le=1.0)
    objective: str = "original"
    l1_weight: float = Field(0.0, ge=0.0)
    target_weight: float = Field(round(400 / WHOLE, 1), ge=0.0)     # 15.0
    kd_weight: float = Field(round(1 - 1 / WHOLE, 4), ge=0.0, le=1.0)   # 0.9624
    kd_temperature: float = Field(2.0, gt=0.0)

    steps: int = Field(150, ge=1)
    batch_size: int = Field(4, ge=1)
    lr: float = Field(2e-4, gt=0.0)
    router_lr: float = Field(2e-4, gt=0.0)
    warmup: float = Field(10 / 150, ge=0.0, le=1.0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.01, ge=0.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.05, ge=0.0, lt=1.0)
    lora_prefix: bool = True
    seed: Seed = 42

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, given: dict) -> dict:
        """What a point's method differs in; a value that is given counts."""
        return METHODS.get(given.get("point", ""), {}) | given
