"""09: the start of a depth router, stage by stage and beside its controls, before any healing."""

from typing import Annotated, ClassVar

from pydantic import Field

from dlr.settings import distinct
from dlr.workbook.phases import phase
from dlr.workbook.phases.training import Dropped, NotebookConfig


@phase("09_depth_router")
class DepthRouterConfig(NotebookConfig):
    """Plans of a book given out by the depth router, by controls and by the oracle."""
    toy: ClassVar = NotebookConfig.toy | {"budgets": [0.4], "label_counts": [32, 60],
                                       "scaling_batches": 1}

    eval_docs: int = Field(48, ge=1)            # test documents that run under every plan
    context_tokens: int = Field(0, ge=0)
    privileged: bool = True     # the ceiling of a router that is fed the dense model's last state
    budgets: Dropped = [0.15, 0.25, 0.4, 0.5, 0.6]
    # numbers of labelled tokens whose routers are compared; more than there are count as all
    label_counts: Annotated[list[Annotated[int, Field(ge=32)]], distinct()] = [
        2500, 5000, 10000, 20000, 40000, 80000, 160000]
    scaling_batches: int = Field(4, ge=1)       # of test documents, for that comparison
