"""The settings of a training run.

Flat on purpose: every field is a parameter of a notebook, a params file and `--set`. A field's
default is the value in the notebook's parameters cell. `dlr.settings` says how they are read.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dlr.base.loading import BaseLoading
from dlr.routing.config import RouterConfig
from dlr.routing.device import fast_bf16
from dlr.routing.router import router_class
from dlr.settings import Dtype, MachineDecides, Named, Seed, distinct
from dlr.train.objectives import OBJECTIVES, Original


class RunConfig(RouterConfig, Original.Weights, BaseLoading):
    """Everything one training run depends on, beside the router's own settings and its objective's.

    Units are in the comments; ratios lie between 0 and 1.
    """
    toy: ClassVar = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_len": 32,
                     "calibration_docs": 4, "eval_docs": 4, "adapter_tokens": 64,
                     "order_tokens": 64, "candidates": 2, "label_tokens": 64, "visits": 512,
                     "context_tokens": 0, "save_steps": 2, "eval_steps": 1, "validation_docs": 2,
                     "bf16": False}
    # of `dataset`, as part of a run's identity; what a training is validated on changes no result
    splits: ClassVar = ("train", "calibration", "test")
    # settings of records that are gone, and had no say in a depth router's run
    retired: ClassVar = ("warm_tokens", "warm_background", "warm_rounds", "warm_epochs",
                         "static_docs")

    # model and data
    # 'nano' (embedded), 'smollm2', a folder, a .gguf file or a Hub id
    model: Named = "nano"
    dataset: Named = "embedded"                 # 'embedded', a local file or folder, or a Hub id
    # above 0: data is the first so many long lines of a text, see dlr.base.lines
    lines: int = Field(0, ge=0)
    load_in_4bit: bool = False                  # NF4 base through bitsandbytes
    dtype: Dtype = "float32"
    attn_implementation: str = "sdpa"   # or 'auto': FlashAttention-2 where it can run
    seq_len: int = Field(256, ge=8)             # tokens a training block
    eval_len: int = Field(256, ge=8)            # tokens a document is cut to where it is evaluated
    calibration_docs: int = Field(160, ge=1)    # documents that choose the threshold
    eval_docs: int = Field(240, ge=1)           # of the test split (243 in the embedded corpus)

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

    # router; what it does not name is as in RouterConfig
    router_class: str = "DepthRouter"
    router_hidden: int = Field(256, ge=1, le=2**16)
    skip_adapter_rank: int = Field(32, ge=0, le=2**16)
    warm_start: bool = True                     # regress a depth router on harm labels first
    router_share: float = Field(0.0, ge=0.0, le=1.0)    # of the steps: a warm router learns

    # what training starts from: skip adapters, static order and harm labels of the base alone
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
    lora_prefix: bool = False   # adapt also the always_keep layers, whose state the router reads
    lora_alpha: int = Field(32, ge=1)
    # projections that are adapted, as q_proj; none named: all of attention and MLP
    lora_targets: Annotated[list[str], distinct()] = []
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    # stochastic depth: the probability that a routable layer is dropped, for a whole batch, a whole
    # sequence, or (random token plans) for each token by itself
    drop_level: Literal["batch", "sequence", "token"] = "sequence"
    layer_drop: float = Field(0.0, ge=0.0, lt=1.0)
    # the same for every layer, or rising with depth, with layer_drop as the mean
    drop_schedule: Literal["uniform", "linear"] = "uniform"
    # autocast wherever a model runs; None: where it is fast
    bf16: Annotated[bool | None, MachineDecides()] = None
    gradient_checkpointing: bool = False
    # of several processes: each holds a part of the base's layers (FSDP2); None: all of it (DDP)
    shard: Annotated[bool | None, MachineDecides()] = None
    save_steps: int = Field(50, ge=1)
    # held-out loss (val_ce in log.csv): every so many steps, and after the last; 0: never
    eval_steps: int = Field(20, ge=0)
    validation_docs: int = Field(32, ge=1)      # of the validation split, which nothing else reads
    # training ends early after so many of them in a row without a better val_ce; 0: it does not
    patience: int = Field(0, ge=0)
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
        if self.patience and not self.eval_steps:
            raise ValueError("patience waits for a better val_ce, and eval_steps=0 measures none: "
                             "give eval_steps, or leave patience out.")
        if self.patience and not OBJECTIVES[self.objective].calibrates:
            raise ValueError(f"patience compares val_ce from step to step, which objective="
                             f"{self.objective!r} lowers by skipping less: leave patience out, or "
                             "take an objective that holds its budget (controlled).")
        if self.shard and self.load_in_4bit:
            raise ValueError("shard=true spreads unpacked weights over processes, and a 4-bit base "
                              "is small enough for each of them; leave shard out.")
        if self.warm_start and not (self.reads_book and self.level == "token"):
            raise ValueError("warm_start regresses a router on the harm of a book's plans for each "
                             f"token, which router_class={self.router_class!r} at "
                             f"level={self.level!r} does not predict; set warm_start=false, or "
                             "router_class='DepthRouter' and level='token'.")
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
