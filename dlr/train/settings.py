"""The settings of a training run.

Flat on purpose: every field is a parameter of a notebook, a params file and `--set`. A field's
default is the value in the notebook's parameters cell. `dlr.settings` says how they are read.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dlr.routing.config import RouterConfig
from dlr.routing.device import fast_bf16
from dlr.routing.router import router_class
from dlr.settings import Dtype, MachineDecides, Named, Seed, distinct
from dlr.train.objectives import OBJECTIVES, Original


class RunConfig(RouterConfig, Original.Weights):
    """Everything one training run depends on, beside the router's own settings and its objective's.

    Units are in the comments; ratios lie between 0 and 1.
    """
    toy: ClassVar = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_len": 32,
                     "calibration_docs": 4, "eval_docs": 4, "warm_tokens": 64, "warm_epochs": 1,
                     "warm_rounds": 1, "save_steps": 2, "bf16": False}
    splits: ClassVar = ("train", "calibration", "test")     # of `dataset`: part of a run's identity

    # model and data
    # 'nano' (embedded), 'smollm2', a folder, a .gguf file or a Hub id
    model: Named = "nano"
    dataset: Named = "embedded"                 # 'embedded', a local file or folder, or a Hub id
    load_in_4bit: bool = False                  # NF4 base through bitsandbytes
    dtype: Dtype = "float32"
    attn_implementation: str = "sdpa"   # or 'auto': FlashAttention-2 where it can run
    seq_len: int = Field(256, ge=8)             # tokens a training block
    eval_len: int = Field(256, ge=8)            # tokens a document is cut to where it is evaluated
    calibration_docs: int = Field(160, ge=1)    # documents that choose the threshold
    eval_docs: int = Field(240, ge=1)           # of the test split (243 in the embedded corpus)
    static_docs: int = Field(32, ge=1)          # read by the search for the best static plan

    # objective
    objective: str = "controlled"               # the name of a class of dlr.train.objectives
    weights: dict[str, Any] = {}                # of an objective of one's own, by name
    target_skip: float = Field(0.4, ge=0.0, le=1.0)     # the budget asked for
    ramp: float = Field(0.2, ge=0.0, le=1.0)    # share of the steps in which the budget grows
    dual_rate: float = Field(1.0, gt=0.0)       # share of the missed skip that one step makes good
    kd_weight: float = Field(0.5, ge=0.0, le=1.0)       # loss = (1 - kd_weight) CE + kd_weight KD
    kd_temperature: float = Field(1.0, gt=0.0)
    kd_warmup: float = Field(0.0, ge=0.0, le=1.0)    # share of the steps before KD counts
    gumbel_start: float = Field(1.0, gt=0.0)    # temperature of straight-through gates, first step
    gumbel_end: float = Field(0.5, gt=0.0)      # the same, last step
    # scale of the noise that drawn gates begin with; 0: straight-through gates without noise
    gumbel_noise: float = Field(1.0, ge=0.0)

    # warm start
    warm_start: bool = True                     # regress the router on marginal harm first
    warm_tokens: int = Field(6144, ge=64)       # tokens labelled, each with R + 2 forward passes
    # plans of round 1: the best static one, or random ones; later rounds take the router's own
    warm_background: Literal["static", "random"] = "static"
    warm_rounds: int = Field(2, ge=1)
    warm_epochs: int = Field(30, ge=1)
    router_share: float = Field(0.0, ge=0.0, le=1.0)    # of the steps: a warm router learns

    # a depth router's start: skip adapters, static order and harm labels of the base alone
    adapter_tokens: int = Field(16384, ge=64)   # read by the closed-form fit of skip adapters
    order_tokens: int = Field(1024, ge=64)      # read by the greedy search for the book's order
    candidates: int = Field(10, ge=1)           # units that a round of the search tries
    label_tokens: int = Field(49152, ge=64)     # labelled under every plan of the book
    context_tokens: int = Field(0, ge=0)        # labelled in context, under one plan each
    label_batch: int = Field(1024, ge=64)       # tokens labelled at once: more need more memory
    # labels that the regression looks at in all; fewer where that were many times each
    visits: int = Field(600_000, ge=1)
    # heal for every budget at once: each sequence draws a skip ratio, or runs dense
    elastic: bool = False

    # optimisation
    steps: int = Field(150, ge=1)
    batch_size: int = Field(8, ge=1)            # sequences a forward pass, of all processes
    accumulation: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0.0)             # LoRA
    router_lr: float = Field(1e-3, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0)         # share of the steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"    # of rates, after the warm-up
    weight_decay: float = Field(0.0, ge=0.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    lora_rank: int = Field(16, ge=1)
    lora_prefix: bool = True    # adapt also the always_keep layers, whose state the router reads
    lora_alpha: int = Field(32, ge=1)
    # projections that are adapted, as q_proj; none named: all of attention and MLP
    lora_targets: Annotated[list[str], distinct()] = []
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    # stochastic depth: the probability that a routable layer is dropped
    layer_drop: float = Field(0.0, ge=0.0, lt=1.0)
    # the same for every layer, or rising with depth, with layer_drop as the mean
    drop_schedule: Literal["uniform", "linear"] = "uniform"
    # autocast wherever a model runs; None: where it is fast
    bf16: Annotated[bool | None, MachineDecides()] = None
    gradient_checkpointing: bool = False
    # of several processes: each holds a part of the base's layers (FSDP2); None: all of it (DDP)
    shard: Annotated[bool | None, MachineDecides()] = None
    save_steps: int = Field(50, ge=1)
    seed: Seed = 0

    @field_validator("objective")
    @classmethod
    def _a_known_objective(cls, name: str) -> str:
        if name not in OBJECTIVES:
            raise ValueError(f"the objectives are {', '.join(OBJECTIVES)}; one of your own is "
                             "known once the file of its class is imported")
        return name

    @model_validator(mode="after")
    def _consistent(self):
        OBJECTIVES[self.objective].weights_of(self)
        if self.elastic and not (self.reads_book and self.warm_start):
            raise ValueError("elastic draws prices from a calibrated router: set "
                             "router_class='DepthRouter' and warm_start=true, or elastic=false.")
        if self.shard and self.load_in_4bit:
            raise ValueError("shard=true spreads unpacked weights over processes, and a 4-bit base "
                             "is small enough for each of them; leave shard out.")
        if self.level == "sequence" and self.warm_start:
            raise ValueError("warm_start labels single tokens and level='sequence' has none; set "
                             "warm_start=false.")
        return self

    @property
    def autocast(self) -> bool:
        """Whether training and evaluation compute in bfloat16: `bf16`, or what is fast here."""
        return fast_bf16() if self.bf16 is None else self.bf16

    def changed(self, **changes):
        """As `Settings.changed`; weights of one objective do not go on to another."""
        if changes.get("objective", self.objective) != self.objective:
            changes = {"weights": {}} | changes
        return super().changed(**changes)

    @property
    def reads_book(self) -> bool:
        """Whether the router is one that chooses from a book of plans."""
        return hasattr(router_class(self.router_class), "set_order")

    @property
    def is_prepared(self) -> bool:
        """Whether training starts from what `dlr.train.prepare` finds of the base."""
        return self.reads_book or bool(self.skip_adapter_rank)

    def router(self) -> RouterConfig:
        """The part of the settings a router is built from."""
        return RouterConfig(**{name: getattr(self, name) for name in RouterConfig.model_fields})
