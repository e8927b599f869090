"""10: what each stage of the method adds over the one before."""

from typing import ClassVar

from pydantic import Field

from dlr.settings import Ratio
from dlr.workbook.phases import phase
from dlr.workbook.phases.training import Dropped, NotebookConfig


@phase("10_stages")
class StagesConfig(NotebookConfig):
    """The stages of one seed at every budget."""
    toy: ClassVar = NotebookConfig.toy | {"budgets": [0.4], "context_tokens": 64}

    elastic: bool = True
    context_tokens: int = Field(16384, ge=0)
    learning_share: Ratio = 1.0            # of the last stage's steps: the router learns
    budgets: Dropped = [0.2, 0.4, 0.6]
