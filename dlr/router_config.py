"""The settings of a router, stored beside its weights."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator
from typing_extensions import TypedDict          # pydantic asks for this one below Python 3.12

from dlr.settings import Settings


class Base(TypedDict, total=False):
    """The model a router was made for, see `weights.base_record`."""
    __pydantic_config__ = ConfigDict(extra="allow")
    model_type: str
    name: str
    layers: int
    width: int
    vocabulary: int
    fingerprint: str
    dtype: str
    quantisation: dict[str, Any] | None


class RouterConfig(Settings):
    """What a router is, stored beside its weights (`router_config.json`)."""

    level: Literal["token", "sequence"] = "token"      # one plan a token, or one a sequence
    unit: Literal["layer", "sublayer"] = "layer"       # gate whole layers, or attention and MLP apart
    kv: Literal["complete", "drop"] = "complete"       # skipped tokens leave keys and values, or none (no cache)
    strategy: Literal["single_pass", "two_pass"] = "single_pass"
    always_keep: int = Field(4, ge=1)                  # layers, the prefix every token runs (K)
    keep_last: int = Field(0, ge=0)                    # layers at the end that every token runs
    keep_first_tokens: int = Field(1, ge=0, lt=2**31)  # tokens at the start of a sequence that run every layer
    pool_tokens: int = Field(16, ge=1, le=2**16)       # tokens whose mean state decides a sequence-level plan
    router_hidden: int = Field(128, ge=1, le=2**16)    # width of the router's two hidden layers
    keep_bias: float = 2.0                             # initial logit: routers start by keeping layers
    skip_adapter_rank: int = Field(0, ge=0, le=2**16)  # rank of a low-rank path for skipped tokens, 0 = none
    threshold: float = 0.0                             # gate = logit > threshold at evaluation
    calibrated_skip: float | None = None               # skip ratio measured on the calibration split
    curve: list[float] = []                            # thresholds at calibrated skips of 0, 1, ... 80 %: the dial
    base: Base = {}                                    # the model the router was made for

    @field_validator("curve")
    @classmethod
    def _a_curve(cls, curve: list[float]) -> list[float]:
        if curve and (len(curve) != 81 or curve != sorted(curve)):
            raise ValueError("a calibration curve has 81 thresholds, which never fall")
        return curve
