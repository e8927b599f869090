"""00: the settings of the notebook that pretrains, exports and reports the embedded base."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dlr.settings import Local, LocalPath, Seed
from dlr.workbook.phases import PhaseSettings, phase


@phase("00_base_model")
class BaseModelConfig(PhaseSettings):
    """00: pretraining of the embedded base model (`dlr.workbook.base_model`)."""
    toy: ClassVar = {"steps": 2, "batch_size": 2, "seq_len": 32, "layers": 5, "width": 64,
                     "vocab_size": 300, "eval_docs": 2}
    data: ClassVar = "embedded+text_dir"

    stage: Literal["report", "stable", "decay", "export"] = "report"
    # checkpoints and token stream, which are not committed
    work_dir: Annotated[str, LocalPath(output=True)] = "base-model"
    text_dir: Local = ""                    # folder of text beside the embedded corpus
    dataset: Local = ""                     # a Hub dataset instead of both
    vocab_size: int = Field(4096, ge=300)
    layers: int = Field(16, ge=2)
    width: int = Field(192, ge=64)
    steps: int = Field(1000, ge=1)
    seq_len: int = Field(256, ge=16)
    batch_size: int = Field(32, ge=1)
    muon_lr: float = Field(6e-3, gt=0.0)
    adamw_lr: float = Field(4e-3, gt=0.0)
    compile: bool = False
    wikitext_test: Local = ""               # WikiText-103 test: text, or one-column CSV as .txt
    tinystories_validation: Local = ""      # a file of the TinyStories validation split
    eval_docs: int = Field(240, ge=1)
    seed: Seed = 0
