"""05: the settings of the notebook that runs benchmark tasks on every variant."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dlr.base.loading import BaseLoading
from dlr.settings import Local, LocalPath, Named, Settings, default_of, distinct
from dlr.workbook.phases import PhaseSettings, phase


class VariantSpec(Settings):
    """One row of an evaluation: a checkpoint and what decides which layers run (dlr.load)."""
    name: str
    checkpoint: Named = "nano"          # checkpoint, run or phase; 'nano-router'; or a base model
    variant: Literal["routed", "static", "stochastic", "dense", "base"] | None = None
    skip: float | None = Field(None, ge=0.0, le=1.0)
    order: Annotated[str | None, LocalPath()] = None       # run that holds the greedy static order
    match: str | None = None                # name of a routed row: its measured skip, task by task


# The comparison that every clone can make, beside the embedded base, which is always the first row.
EMBEDDED_ROWS = [
    VariantSpec(name="router", checkpoint="nano-router"),
    VariantSpec(name="static plan", checkpoint="nano-router", variant="static", match="router")]


@phase("05_evaluation")
class EvaluationConfig(BaseLoading, PhaseSettings):
    """05: tasks through lm-evaluation-harness, every variant in one table (`dlr.bench.run`)."""
    toy: ClassVar = {"limit": 2.0}
    data: ClassVar = ""                     # tasks and checkpoints are told apart one by one

    # a phase, or several: each checkpoint of their finished runs on this base is a row
    phase: str | Annotated[list[str], distinct()] = ""
    variants: list[VariantSpec] = EMBEDDED_ROWS            # rows beside those and the base model's
    model: Named = "nano"                   # base model of the checkpoints, for the base row
    # harness tasks, groups, tags; wikitext103, embedded
    tasks: Annotated[list[str], Field(min_length=1), distinct()] = ["embedded"]
    num_fewshot: int | None = Field(None, ge=0)     # examples a question; None: the task's own
    limit: float | None = Field(40.0, gt=0.0)    # rows of each task, or a share below 1; None: all
    data_dir: Local = ""                    # folder of local files instead of the hub
    batch_size: int = Field(16, ge=1)       # requests a forward pass
    # free-running agreement with the base's greedy text (`dlr.measure.agreement`); 0: not measured
    agreement_docs: int = Field(0, ge=0)        # test documents whose openings are continued
    agreement_prompt: int = Field(64, ge=1)     # tokens of an opening
    agreement_tokens: int = Field(64, ge=1)     # tokens generated after it
    dataset: Named = "embedded"                 # of those documents, as in training

    @model_validator(mode="after")
    def _rows_of_this_base(self):
        """The default rows are of the embedded model: another base, or a phase, brings its own."""
        if self.variants == EMBEDDED_ROWS and (self.phase or self.model != "nano"):
            self.variants = []
        return self

    @model_validator(mode="after")
    def _continued_at_all(self):
        idle = [name for name in ("agreement_prompt", "agreement_tokens", "dataset")
                if getattr(self, name) != default_of(type(self), name)]
        if idle and not self.agreement_docs:
            raise ValueError(f"agreement_docs=0 continues no document, so that {', '.join(idle)} "
                             "would have no effect; give agreement_docs, or leave it out")
        return self
