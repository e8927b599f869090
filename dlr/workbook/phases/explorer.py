"""08: the settings of the notebook that opens the explorer."""

from pydantic import Field

from dlr.base.loading import Loading
from dlr.settings import Local, Seed
from dlr.workbook.phases import PhaseSettings, phase


@phase("08_explorer")
class ExplorerConfig(Loading, PhaseSettings):
    """08: the explorer."""
    checkpoint: Local = ""                             # folder or label; '': the embedded router
    text: str = ""                                     # '': the first example
    skip: float = Field(-1.0, ge=-1.0, le=0.8)         # budget; below 0: the calibrated one
    seed: Seed = 0
