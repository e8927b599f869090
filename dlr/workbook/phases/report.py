"""12: the settings of the notebook that puts everything recorded into one document."""

from typing import Annotated, ClassVar

from dlr.settings import Local, LocalPath
from dlr.workbook.phases import PhaseSettings, phase


@phase("12_report")
class ReportConfig(PhaseSettings):
    """12: one document of everything in results/."""
    toy: ClassVar = {"pdf": False}

    results_dir: Local = ""         # results folder; '': results/, or that of DLR_RESULTS
    # folder to write to; '': report/ in the results folder
    out_dir: Annotated[str, LocalPath(output=True)] = ""
    pdf: bool = True                # print the page too, where a browser is at hand
