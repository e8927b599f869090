"""The settings there are: of a router, of a training run, and of each notebook.

Flat on purpose: every field is a parameter of a notebook, of a params file and of `--set name=value`. A field's default
is the value in the notebook's parameters cell. `dlr.settings` says how they are read and refused.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dlr.device import fast_bf16
from dlr.objectives import OBJECTIVES, Original
from dlr.router_config import RouterConfig
from dlr.settings import (Local, LocalPath, MachineDecides, RunName, Seed, Settings, SettingsError, distinct, read_params,
                          validated)

__all__ = ["PHASES", "RouterConfig", "RunConfig", "SettingsError", "read_params", "validated"]

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Counts = Annotated[list[Count], Field(min_length=1), distinct()]
Named = Annotated[Local, Field(min_length=1)]              # '' would be the current folder
Dropped = Annotated[list[Ratio], distinct("{:.0%}")]
Dtype = Literal["float32", "bfloat16", "float16"]


class RunConfig(Original.Weights):
    """Everything one training run depends on. Units are in the comments; ratios lie between 0 and 1."""
    toy: ClassVar = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_len": 32, "calibration_docs": 4, "eval_docs": 4,
                     "warm_tokens": 64, "warm_epochs": 1, "warm_rounds": 1, "save_steps": 2, "bf16": False}
    splits: ClassVar = ("train", "calibration", "test")          # of `dataset`, whose hash is part of a run's identity

    # model and data
    model: Named = "nano"                              # 'nano' (embedded), a local folder or a Hub id
    dataset: Named = "embedded"                        # 'embedded', a local file or folder, or a Hub id
    load_in_4bit: bool = False                         # NF4 base through bitsandbytes
    dtype: Dtype = "float32"
    attn_implementation: str = "sdpa"
    seq_len: int = Field(256, ge=8)                    # tokens a training block
    eval_len: int = Field(256, ge=8)                   # tokens a document is cut to in calibration and evaluation
    calibration_docs: int = Field(160, ge=1)           # documents that choose the threshold
    eval_docs: int = Field(240, ge=1)                  # documents of the test split (243 in the embedded corpus)
    static_docs: int = Field(32, ge=1)                 # calibration documents the search for the best static plan reads

    # router
    level: Literal["token", "sequence"] = "token"
    unit: Literal["layer", "sublayer"] = "layer"
    kv: Literal["complete", "drop"] = "complete"
    strategy: Literal["single_pass", "two_pass"] = "single_pass"
    always_keep: int = Field(4, ge=1)
    keep_last: int = Field(0, ge=0)
    keep_first_tokens: int = Field(1, ge=0, lt=2**31)
    pool_tokens: int = Field(16, ge=1, le=2**16)
    router_hidden: int = Field(128, ge=1, le=2**16)
    keep_bias: float = 2.0
    skip_adapter_rank: int = Field(0, ge=0, le=2**16)

    # objective
    objective: str = "controlled"                      # the name of a class of dlr.objectives
    weights: dict[str, Any] = {}                       # of an objective of one's own, by name
    target_skip: float = Field(0.4, ge=0.0, le=1.0)    # the budget asked for
    ramp: float = Field(0.2, ge=0.0, le=1.0)           # share of the steps over which the budget grows from 0
    dual_rate: float = Field(1.0, gt=0.0)              # share of the missed skip that one step makes good
    kd_weight: float = Field(0.5, ge=0.0, le=1.0)      # loss = (1 - kd_weight) CE + kd_weight KD
    kd_temperature: float = Field(1.0, gt=0.0)
    gumbel_start: float = Field(1.0, gt=0.0)           # temperature of the straight-through gates, first step
    gumbel_end: float = Field(0.5, gt=0.0)             # the same, last step

    # warm start
    warm_start: bool = True                            # regress the router on marginal harm first
    warm_tokens: int = Field(6144, ge=64)             # tokens labelled, each with R + 2 forward passes
    warm_background: Literal["static", "random"] = "static"    # plans of round 1: the best static one, or random ones
    warm_rounds: int = Field(2, ge=1)                  # 1: random background plans; more: the router's own plans
    warm_epochs: int = Field(30, ge=1)
    router_share: float = Field(0.0, ge=0.0, le=1.0)   # share of the steps in which a warm router still learns

    # optimisation
    steps: int = Field(150, ge=1)
    batch_size: int = Field(8, ge=1)                   # sequences a forward pass
    accumulation: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0.0)                    # LoRA
    router_lr: float = Field(1e-3, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0)        # share of the steps
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    layer_drop: float = Field(0.0, ge=0.0, lt=1.0)     # stochastic depth: probability that a routable layer is dropped
    bf16: Annotated[bool | None, MachineDecides()] = None      # autocast wherever a model runs; None: where it is fast
    gradient_checkpointing: bool = False
    save_steps: int = Field(50, ge=1)
    seed: Seed = 0

    @field_validator("objective")
    @classmethod
    def _a_known_objective(cls, name: str) -> str:
        if name not in OBJECTIVES:
            raise ValueError(f"the objectives are {', '.join(OBJECTIVES)}; one of your own is known once the file of its "
                             "class is imported")
        return name

    @model_validator(mode="after")
    def _consistent(self):
        OBJECTIVES[self.objective].weights_of(self)
        if self.level == "sequence" and self.warm_start:
            raise ValueError("warm_start labels single tokens and level='sequence' has none; set warm_start=false.")
        return self

    @property
    def autocast(self) -> bool:
        """Whether training and evaluation compute in bfloat16: `bf16` where it is set, else what is fast here."""
        return fast_bf16() if self.bf16 is None else self.bf16

    def router(self) -> RouterConfig:
        """The part of the settings a router is built from."""
        shared = RouterConfig.model_fields.keys() & type(self).model_fields.keys()
        return RouterConfig(**{name: getattr(self, name) for name in shared})


# -- one schema a notebook: its parameters are these fields ---------------------------------------------
class NotebookConfig(RunConfig):
    """What the training notebooks share."""
    run_name: RunName = ""                             # folder below results/<phase>/; '': exploratory (dlr.places)
    steps: int = Field(40, ge=1)
    eval_docs: int = Field(160, ge=1)


class BaselinesConfig(NotebookConfig):
    """01: dense LoRA and stochastic depth."""
    toy: ClassVar = RunConfig.toy | {"dropped": [0.4]}

    layer_drop: float = Field(0.5, ge=0.0, lt=1.0)
    dropped: Dropped = [0.2, 0.4, 0.6]                 # skip ratios at which stochastic depth is evaluated


class SequenceConfig(NotebookConfig):
    """02: sequence-level routing under one global penalty, swept."""
    toy: ClassVar = RunConfig.toy | {"penalties": [1.0]}

    level: Literal["token", "sequence"] = "sequence"
    objective: str = "global_penalty"
    warm_start: bool = False
    router_lr: float = Field(1e-2, gt=0.0)
    penalties: Annotated[list[Annotated[float, Field(ge=0.0)]], distinct("{:g}")] = [0.3, 1.0, 3.0]


class TokenConfig(NotebookConfig):
    """03: token-level routing, version by version."""
    variants: Annotated[list[str], distinct()] = ["v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"]


class ParetoConfig(NotebookConfig):
    """04: one point of the frontier, the router beside its controls, or the baselines of a seed."""
    toy: ClassVar = RunConfig.toy | {"dropped": [0.4]}

    point: Literal["router", "baselines", "summary"] = "summary"
    dropped: Dropped = [0.2, 0.4, 0.6]


class LatencyConfig(Settings):
    """06: time of dense, truncated, masked, two-pass and compact execution, under the plan of a trained router."""
    toy: ClassVar = {"layers": 5, "lengths": [32], "context": 16, "decode_steps": 2, "repeats": 1, "plan_docs": 2,
                     "skips": [0.5]}
    data: ClassVar = "recorded plan"

    run_name: RunName = ""
    shape: Literal["nano", "tinyllama-1.1b", "qwen2.5-3b"] = "nano"
    checkpoint: Local = ""                             # whose router's plan is recorded; '': the embedded router
    layers: int = Field(0, ge=0)                       # caps the depth to what memory holds; 0: the whole model
    dtype: Annotated[Literal["auto"] | Dtype, MachineDecides()] = "auto"       # auto: bfloat16 where it is fast
    skips: Annotated[list[Annotated[float, Field(gt=0.0, le=1.0)]], Field(min_length=1), distinct()] = [0.25, 0.4, 0.5]
    lengths: Counts = [512]                            # tokens of a prefill
    batches: Counts = [1]                              # sequences of a prefill
    context: int = Field(256, ge=1)                    # tokens in the cache before decoding
    decode_batches: Counts = [1]
    decode_steps: int = Field(16, ge=1)                # steps a turn
    repeats: int = Field(9, ge=1)                      # turns; medians and quartiles are taken over them
    plan_docs: int = Field(16, ge=1)                   # test documents whose plan is recorded
    seed: Seed = 0


class BaseModelConfig(Settings):
    """00: pretraining of the embedded base model."""
    toy: ClassVar = {"steps": 2, "batch_size": 2, "seq_len": 32, "layers": 5, "width": 64, "vocab_size": 300,
                     "eval_docs": 2}
    data: ClassVar = "embedded+text_dir"

    run_name: RunName = ""
    stage: Literal["report", "stable", "decay", "export"] = "report"
    work_dir: Annotated[str, LocalPath(output=True)] = "base-model"    # checkpoints, token stream; not committed
    text_dir: Local = ""                               # folder of text beside the embedded corpus
    dataset: Local = ""                                # a Hub dataset instead of both
    vocab_size: int = Field(4096, ge=300)
    layers: int = Field(16, ge=2)
    width: int = Field(192, ge=64)
    steps: int = Field(1000, ge=1)
    seq_len: int = Field(256, ge=16)
    batch_size: int = Field(32, ge=1)
    muon_lr: float = Field(6e-3, gt=0.0)
    adamw_lr: float = Field(4e-3, gt=0.0)
    compile: bool = False
    wikitext_test: Local = ""                          # WikiText-103 test: text file, or one-column CSV as .txt
    tinystories_validation: Local = ""                 # a file of the TinyStories validation split
    eval_docs: int = Field(240, ge=1)
    seed: Seed = 0


class ExplorerConfig(Settings):
    """08: the explorer."""
    run_name: RunName = ""
    checkpoint: Local = ""                             # folder or label; empty: the embedded router
    text: str = ""                                     # empty: the first example
    skip: float = Field(-1.0, ge=-1.0, le=0.8)         # budget; below 0: the calibrated one
    seed: Seed = 0


class TokenAnalysisConfig(Settings):
    """07: what a trained router has learnt. Documents are those of the test split, in its order."""
    toy: ClassVar = {"record_docs": 6, "eval_len": 32, "oracle_docs": 3, "probe_docs": 6, "oracle_len": 24,
                     "budgets": [0.4], "weights": ["checkpoint"], "calibration_docs": 4, "frequency_docs": 4}
    splits: ClassVar = ("test", "calibration")

    run_name: RunName = ""
    checkpoint: Local = ""                             # a checkpoint's folder; '' is the embedded router
    untrained: bool = False                            # random router logits: what meaningless routing looks like
    dataset: Local = "embedded"
    record_docs: int = Field(96, ge=1)                 # documents recorded token by token
    eval_len: int = Field(192, ge=8)                   # tokens a recorded document is cut to
    oracle_docs: int = Field(16, ge=1)                 # documents of the oracle's sample; as many calibration ones
    probe_docs: int = Field(48, ge=3)                  # documents of the probes' sample
    oracle_len: int = Field(96, ge=8)                  # tokens their documents are cut to
    budgets: Annotated[list[Ratio], Field(min_length=1), distinct()] = [0.2, 0.4, 0.6]     # skips for the headroom
    # with the LoRA, and without
    weights: Annotated[list[Literal["checkpoint", "base"]], Field(min_length=1), distinct()] = ["checkpoint", "base"]
    calibration_docs: int = Field(96, ge=1)            # for checkpoints that were saved without a dial
    frequency_docs: int = Field(400, ge=1)             # training documents in which tokens are counted
    seed: Seed = 0


class VariantSpec(Settings):
    """One row of an evaluation: a checkpoint and what decides which layers run (dlr.load)."""
    name: str
    checkpoint: Named = "nano"                         # checkpoint, run or phase; 'nano-router'; or a base model
    variant: Literal["routed", "static", "stochastic", "dense", "base"] | None = None
    skip: float | None = Field(None, ge=0.0, le=1.0)
    order: Annotated[str | None, LocalPath()] = None   # run that holds the greedy static order
    match: str | None = None                           # name of a routed row: its measured skip, task by task


# The comparison that every clone can make: the embedded base (always the first row), its router, and the static plan.
EMBEDDED_ROWS = [
    VariantSpec(name="router", checkpoint="nano-router"),
    VariantSpec(name="static plan", checkpoint="nano-router", variant="static", order="results/token_routing/router",
                match="router")]


class EvaluationConfig(Settings):
    """05: benchmark tasks through lm-evaluation-harness, every variant in one table."""
    toy: ClassVar = {"limit": 2.0}
    data: ClassVar = ""                                # tasks and checkpoints are told apart one by one (dlr.benchmark)

    run_name: RunName = ""
    phase: str = ""                                    # every checkpoint of this phase's finished runs is a row
    variants: list[VariantSpec] = EMBEDDED_ROWS        # rows beside those and the base model's
    model: Named = "nano"                              # base model of the checkpoints, for the base row
    # harness tasks, groups, tags; wikitext103, embedded
    tasks: Annotated[list[str], Field(min_length=1), distinct()] = ["embedded"]
    num_fewshot: int | None = Field(None, ge=0)        # examples before each question; None: the task's own
    limit: float | None = Field(40.0, gt=0.0)          # rows of each task, or a share below 1; None: all
    data_dir: Local = ""                               # folder of local files instead of the hub
    batch_size: int = Field(16, ge=1)                  # requests a forward pass
    dtype: Dtype | None = None                         # of the base's weights; None: as the checkpoint's
    attn_implementation: str = "sdpa"                  # sdpa, eager or flash_attention_2
    load_in_4bit: bool | None = None                   # NF4 base through bitsandbytes; None: as the checkpoint's

    @model_validator(mode="after")
    def _rows_of_this_base(self):
        """The default rows are of the embedded model: another base, or a phase, brings its own."""
        if self.variants == EMBEDDED_ROWS and (self.phase or self.model != "nano"):
            self.variants = []
        return self


PHASES: dict[str, tuple[str, type[Settings]]] = {
    "base_model": ("00_base_model", BaseModelConfig), "baselines": ("01_baselines", BaselinesConfig),
    "sequence_routing": ("02_sequence_routing", SequenceConfig), "token_routing": ("03_token_routing", TokenConfig),
    "pareto": ("04_pareto", ParetoConfig), "evaluation": ("05_evaluation", EvaluationConfig),
    "latency": ("06_latency", LatencyConfig), "token_analysis": ("07_token_analysis", TokenAnalysisConfig),
    "explorer": ("08_explorer", ExplorerConfig)}
