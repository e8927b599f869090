"""Validated settings: the only place where YAML and notebook parameters become objects.

Flat on purpose: every field is a parameter of a notebook, of a params file and of `--set name=value`.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


def fast_bf16() -> bool:
    """Whether bfloat16 matrix products are faster here than float32: emulated ones take about five times as long."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class RouterConfig(BaseModel):
    """What a router is, stored beside its weights (`router_config.json`)."""
    model_config = ConfigDict(extra="forbid", strict=True)

    level: Literal["token", "sequence"] = "token"      # one plan a token, or one a sequence
    unit: Literal["layer", "sublayer"] = "layer"       # gate whole layers, or attention and MLP apart
    kv: Literal["complete", "drop"] = "complete"       # skipped tokens leave keys and values, or none (masked, no cache)
    strategy: Literal["single_pass", "two_pass"] = "single_pass"
    always_keep: int = Field(4, ge=1)                  # layers, the prefix every token runs (K)
    keep_last: int = Field(0, ge=0)                    # layers at the end that every token runs
    keep_first_tokens: int = Field(1, ge=0)            # tokens at the start of a sequence that run every layer
    pool_tokens: int = Field(16, ge=1)                 # tokens whose mean state decides a sequence-level plan
    router_hidden: int = Field(128, ge=1)              # width of the router's two hidden layers
    keep_bias: float = 2.0                             # initial logit: routers start by keeping layers
    skip_adapter_rank: int = Field(0, ge=0)            # rank of a low-rank path for skipped tokens, 0 = none
    threshold: float = 0.0                             # gate = logit > threshold at evaluation
    calibrated_skip: float | None = None               # skip ratio measured on the calibration split
    curve: list[float] = []                            # thresholds at calibrated skips of 0, 1, ... 80 %: the dial's marks
    base: dict[str, Any] = {}                          # the model the router was made for


class RunConfig(BaseModel):
    """Everything one training run depends on. Units are in the comments; ratios lie between 0 and 1."""
    model_config = ConfigDict(extra="forbid", strict=True)

    # model and data
    model: str = "nano"                                # 'nano' (embedded), a local folder or a Hub id
    dataset: str = "embedded"                          # 'embedded', a local file or folder, or a Hub id
    load_in_4bit: bool = False                         # NF4 base through bitsandbytes
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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
    keep_first_tokens: int = Field(1, ge=0)
    pool_tokens: int = Field(16, ge=1)
    router_hidden: int = Field(128, ge=1)
    keep_bias: float = 2.0
    skip_adapter_rank: int = Field(0, ge=0)

    # objective
    objective: Literal["controlled", "original", "global_penalty"] = "controlled"
    target_skip: float = Field(0.4, ge=0.0, le=1.0)    # the budget asked for
    ramp: float = Field(0.2, ge=0.0, le=1.0)           # share of the steps over which the budget grows from 0
    dual_rate: float = Field(1.0, gt=0.0)              # logit units the threshold moves a unit of missed skip
    penalty: float = Field(1.0, ge=0.0)                # lambda of 'global_penalty' and of 'original'
    l1_weight: float = Field(5.0, ge=0.0)              # 'original': per-layer L1, summed over layers
    target_weight: float = Field(8.0, ge=0.0)          # 'original': squared distance to the target
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
    bf16: bool | None = None                           # autocast in training and evaluation; None: where it is fast
    gradient_checkpointing: bool = False
    save_steps: int = Field(50, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self):
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


class SettingsError(ValueError):
    """A setting that is unknown, mistyped or out of range; the message names it and the remedy."""


def _explain(error: dict, given: dict[str, Any], known: list[str]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    hint = ""
    if isinstance(given.get(name), str) and error["type"] in ("float_type", "int_type"):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)"
    return f"{name}={given.get(name)!r}: {message[0].lower()}{message[1:]}{hint}"


def validated(given: dict[str, Any], schema: type[BaseModel] = RunConfig) -> BaseModel:
    """`schema(**given)`, or a SettingsError with one sentence a problem."""
    try:
        return schema(**given)
    except ValidationError as errors:
        known = list(schema.model_fields)
        raise SettingsError("; ".join(_explain(e, given, known) for e in errors.errors())) from None


def read_params(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML params file (differences from the defaults only).

    Raises:
        FileNotFoundError, SettingsError: no such file (the neighbours are named), or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"No params file {str(path)!r}." + (f" There are: {', '.join(there)}." if there else ""))
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{str(path)!r} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded or {}, dict):
        raise SettingsError(f"{str(path)!r} must hold 'name: value' lines, not a {type(loaded).__name__}.")
    return loaded or {}


# -- one schema a notebook: its parameters are these fields -----------------------------------------------------------
RunName = Annotated[str, Field(pattern=r"^[\w.=+-]+$")]          # a folder's name, never a path


class BaselinesConfig(RunConfig):
    """01: dense LoRA and stochastic depth."""
    run_name: RunName = "default"
    layer_drop: float = Field(0.5, ge=0.0, lt=1.0)
    dropped: list[float] = [0.2, 0.4, 0.6]             # skip ratios at which stochastic depth is evaluated


class SequenceConfig(RunConfig):
    """02: sequence-level routing under one global penalty, swept."""
    run_name: RunName = "default"
    level: Literal["token", "sequence"] = "sequence"
    objective: Literal["controlled", "original", "global_penalty"] = "global_penalty"
    warm_start: bool = False
    penalties: list[float] = [0.0, 0.3, 1.0, 3.0]


class TokenConfig(RunConfig):
    """03: token-level routing, version by version."""
    run_name: RunName = "default"
    variants: list[str] = ["v1", "v2", "cold", "DLR", "DLR without KD", "best static", "dense LoRA"]


class ParetoConfig(RunConfig):
    """04: one point of the frontier, the router beside its controls, or the baselines of a seed."""
    run_name: RunName = "default"
    point: Literal["router", "baselines", "summary"] = "summary"
    dropped: list[float] = [0.2, 0.4, 0.6]


class LatencyConfig(BaseModel):
    """06: time of dense, truncated, masked, two-pass and compact execution, under the plan of a trained router."""
    model_config = ConfigDict(extra="forbid", strict=True)

    run_name: RunName = "default"
    shape: Literal["nano", "tinyllama-1.1b", "qwen2.5-3b"] = "nano"
    checkpoint: str = ""                               # whose router's plan is recorded; '': the embedded router
    layers: int = Field(0, ge=0)                       # caps the depth to what memory holds; 0: the whole model
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"      # auto: bfloat16 where the hardware has it
    skips: list[float] = [0.25, 0.4, 0.5]
    lengths: list[int] = [512]                         # tokens of a prefill
    batches: list[int] = [1]                           # sequences of a prefill
    context: int = Field(256, ge=1)                    # tokens in the cache before decoding
    decode_batches: list[int] = [1]
    decode_steps: int = Field(16, ge=1)                # steps a turn
    repeats: int = Field(9, ge=1)                      # turns; medians and quartiles are taken over them
    plan_docs: int = Field(16, ge=1)                   # test documents whose plan is recorded
    seed: int = 0


class BaseModelConfig(BaseModel):
    """00: pretraining of the embedded base model."""
    model_config = ConfigDict(extra="forbid", strict=True)

    run_name: RunName = "default"
    stage: Literal["report", "stable", "decay", "export"] = "report"
    work_dir: str = "base-model"                       # checkpoints and the token stream; resumable, not committed
    text_dir: str = ""                                 # folder of text beside the embedded corpus
    dataset: str = ""                                  # a Hub dataset instead of both
    vocab_size: int = Field(4096, ge=300)
    layers: int = Field(16, ge=2)
    width: int = Field(192, ge=64)
    steps: int = Field(1000, ge=1)
    seq_len: int = Field(256, ge=16)
    batch_size: int = Field(32, ge=1)
    muon_lr: float = Field(6e-3, gt=0.0)
    adamw_lr: float = Field(4e-3, gt=0.0)
    compile: bool = False
    wikitext_test: str = ""                            # WikiText-103 test: text file, or one-column CSV as .txt
    tinystories_validation: str = ""                   # a file of the TinyStories validation split
    eval_docs: int = Field(240, ge=1)
    seed: int = 0


class ExplorerConfig(BaseModel):
    """08: the explorer."""
    model_config = ConfigDict(extra="forbid", strict=True)

    run_name: RunName = "default"
    checkpoint: str = ""                               # folder or label; empty: the embedded router
    text: str = ""                                     # empty: the first example
    skip: float = Field(-1.0, ge=-1.0, le=0.8)         # budget; below 0: the calibrated one
    seed: int = 0


class TokenAnalysisConfig(BaseModel):
    """07: what a trained router has learnt. Documents are those of the test split, in its order."""
    model_config = ConfigDict(extra="forbid", strict=True)

    run_name: RunName = "default"
    checkpoint: str = ""                               # a checkpoint's folder; '' is the embedded router
    untrained: bool = False                            # random router logits: what meaningless routing looks like
    dataset: str = "embedded"
    record_docs: int = Field(96, ge=1)                 # documents recorded token by token
    eval_len: int = Field(192, ge=8)                   # tokens a recorded document is cut to
    oracle_docs: int = Field(16, ge=1)                 # documents of the oracle's sample; as many calibration ones
    probe_docs: int = Field(48, ge=3)                  # documents of the probes' sample
    oracle_len: int = Field(96, ge=8)                  # tokens their documents are cut to
    budgets: list[float] = [0.2, 0.4, 0.6]             # skip ratios at which the headroom is measured
    weights: list[Literal["checkpoint", "base"]] = ["checkpoint"]      # with the checkpoint's LoRA, and without
    calibration_docs: int = Field(96, ge=1)            # for checkpoints that were saved without a dial
    frequency_docs: int = Field(400, ge=1)             # training documents in which tokens are counted
    seed: int = 0


class VariantSpec(BaseModel):
    """One row of an evaluation: a checkpoint and what decides which layers run (dlr.variants.open_variant)."""
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    checkpoint: str = "nano"                           # checkpoint, run or phase; 'nano-router'; or a base model
    variant: Literal["routed", "static", "stochastic", "dense", "base"] | None = None
    skip: float | None = Field(None, ge=0.0, le=1.0)
    order: str | None = None                           # run that holds the greedy static order
    match: str | None = None                           # name of a routed row: its measured skip, task by task


class EvaluationConfig(BaseModel):
    """05: benchmark tasks through lm-evaluation-harness, every variant in one table."""
    model_config = ConfigDict(extra="forbid", strict=True)

    run_name: RunName = "default"
    phase: str = ""                                    # every checkpoint of this phase's finished runs is a row
    variants: list[VariantSpec] = []                   # rows beside those; none of either: the base model
    model: str = "nano"                                # base model of the checkpoints, for the base row
    tasks: list[str] = ["embedded"]                    # harness tasks, groups, tags; wikitext103, embedded
    num_fewshot: int | None = Field(None, ge=0)        # examples before each question; None: the task's own
    limit: float | None = Field(40.0, gt=0.0)          # rows of each task, or a share below 1; None: all
    data_dir: str = ""                                 # folder of local files instead of the hub
    batch_size: int = Field(16, ge=1)                  # requests a forward pass
    dtype: Literal["float32", "bfloat16", "float16"] | None = None    # of the base's weights; None: as the checkpoint's
    attn_implementation: str = "sdpa"                  # sdpa, eager or flash_attention_2
    load_in_4bit: bool | None = None                   # NF4 base through bitsandbytes; None: as the checkpoint's


PHASES: dict[str, tuple[str, type[BaseModel]]] = {
    "base_model": ("00_base_model", BaseModelConfig), "baselines": ("01_baselines", BaselinesConfig),
    "sequence_routing": ("02_sequence_routing", SequenceConfig), "token_routing": ("03_token_routing", TokenConfig),
    "pareto": ("04_pareto", ParetoConfig), "evaluation": ("05_evaluation", EvaluationConfig),
    "latency": ("06_latency", LatencyConfig), "token_analysis": ("07_token_analysis", TokenAnalysisConfig),
    "explorer": ("08_explorer", ExplorerConfig)}
