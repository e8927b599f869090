"""The settings of a router, what calibration finds for it, and the file that holds both."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from dlr.settings import Settings, default_of


class RouterConfig(Settings):
    """What a router is."""

    router_class: str = "Router"                       # `router.Router`, or a subclass by its name
    level: Literal["token", "sequence"] = "token"      # one plan a token, or one a sequence
    unit: Literal["layer", "sublayer"] = "layer"  # gate whole layers, or attention and MLP apart
    # skipped tokens leave keys and values, or none (no cache)
    kv: Literal["complete", "drop"] = "complete"
    strategy: Literal["single_pass", "two_pass"] = "single_pass"
    always_keep: int = Field(4, ge=1)                  # layers, the prefix every token runs (K)
    keep_last: int = Field(0, ge=0)                    # layers at the end that every token runs
    # tokens at the start of a sequence that run every layer
    keep_first_tokens: int = Field(1, ge=0, lt=2**31)
    # tokens whose mean state decides a sequence-level plan
    pool_tokens: int = Field(16, ge=1, le=2**16)
    router_hidden: int = Field(128, ge=1, le=2**16)    # width of the router's two hidden layers
    keep_bias: float = 2.0  # initial logit: routers start by keeping layers
    # rank of a low-rank path for skipped tokens, 0 = none
    skip_adapter_rank: int = Field(0, ge=0, le=2**16)
    # of a depth router: plans in its book, and the share of the units that the last one drops
    book_plans: int = Field(12, ge=2, le=256)
    book_depth: float = Field(0.9, gt=0.0, le=1.0)

    @property
    def forced_tokens(self) -> int:
        """Tokens at a sequence's start that run every layer in any case, pooled ones included."""
        return max(self.keep_first_tokens, self.pool_tokens if self.level == "sequence" else 0)

    @model_serializer(mode="wrap")
    def _as_before(self, written):
        """Leaves out what the usual router has no use for: files from before have none of it."""
        values = written(self)
        if values.get("router_class") == default_of(type(self), "router_class") == "Router":
            for name in ("router_class", "book_plans", "book_depth"):
                values.pop(name, None)
        return values


@dataclass
class Calibration:
    """The state of a router's budget, found on held-out text.

    Attributes:
        threshold: a unit runs where its logit lies above.
        skip: the skip ratio measured at that threshold; None: it was never calibrated.
        curve: the thresholds at skips of 0, 1, ... 80 %, for the dial; empty: not known.
    """
    threshold: float = 0.0
    skip: float | None = None
    curve: list[float] = field(default_factory=list)


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


class RouterRecord(RouterConfig):
    """What `router_config.json` holds: settings, calibration, and the base of a router."""
    threshold: float = 0.0
    calibrated_skip: float | None = None
    curve: list[float] = []
    base: Base = {}

    @field_validator("curve")
    @classmethod
    def _a_curve(cls, curve: list[float]) -> list[float]:
        if curve and (len(curve) != 81 or curve != sorted(curve)):
            raise ValueError("a calibration curve has 81 thresholds, which never fall")
        return curve

    @staticmethod
    def of(config: RouterConfig, calibration: Calibration, base: dict) -> dict:
        """The record as a mapping, ready to be written."""
        calibrated = dict(threshold=calibration.threshold, calibrated_skip=calibration.skip,
                          curve=calibration.curve)
        return config.model_dump() | calibrated | {"base": base}

    @property
    def config(self) -> RouterConfig:
        return RouterConfig(**{name: getattr(self, name) for name in RouterConfig.model_fields})

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.threshold, self.calibrated_skip, list(self.curve))
