"""07: the settings of the notebook that asks what a trained router has learnt."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dlr.base.loading import Loading
from dlr.settings import Local, Ratio, Seed, distinct
from dlr.workbook.phases import PhaseSettings, phase

Weights = Literal["checkpoint", "base"]


@phase("07_token_analysis")
class TokenAnalysisConfig(Loading, PhaseSettings):
    """07: the token analysis. Documents are the test split's, in its order."""
    toy: ClassVar = {"record_docs": 6, "eval_len": 32, "oracle_docs": 3, "probe_docs": 6,
                     "oracle_len": 24, "budgets": [0.4], "weights": ["checkpoint"],
                     "calibration_docs": 4, "frequency_docs": 4}
    splits: ClassVar = ("test", "calibration")

    checkpoint: Local = ""                     # a checkpoint's folder; '' is the embedded router
    untrained: bool = False                    # random logits: what meaningless routing looks like
    dataset: Local = "embedded"
    record_docs: int = Field(96, ge=1)         # documents recorded token by token
    eval_len: int = Field(192, ge=8)           # tokens a recorded document is cut to
    oracle_docs: int = Field(16, ge=1)         # documents of the oracle; as many calibration ones
    probe_docs: int = Field(48, ge=3)          # documents of the probes' sample
    oracle_len: int = Field(96, ge=8)          # tokens their documents are cut to
    # skips for the headroom; with the LoRA, and without
    budgets: Annotated[list[Ratio], Field(min_length=1), distinct()] = [0.2, 0.4, 0.6]
    weights: Annotated[list[Weights], Field(min_length=1), distinct()] = ["checkpoint", "base"]
    calibration_docs: int = Field(96, ge=1)    # for checkpoints that were saved without a dial
    frequency_docs: int = Field(400, ge=1)     # training documents in which tokens are counted
    seed: Seed = 0
