"""Settings of how a base model is loaded, shared by every phase that loads one."""

from typing import Any

from pydantic import model_validator

from dlr.base.models import refuse_revision
from dlr.settings import Dtype, Settings


class Loading(Settings):
    """How the base of a checkpoint is loaded, as `dlr.load` takes it."""
    dtype: Dtype | None = None              # of the base's weights; None: as the checkpoint's
    load_in_4bit: bool | None = None    # NF4 base through bitsandbytes; None: as the checkpoint's
    attn_implementation: str = "sdpa"       # sdpa, eager, flash_attention_2 or auto

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `dlr.load` for a checkpoint; what is None is as its record says."""
        return {"dtype": None if self.dtype == "auto" else self.dtype,
                "load_in_4bit": self.load_in_4bit, "attn_implementation": self.attn_implementation}


class BaseLoading(Loading):
    """How a base model named by the setting `model` is loaded."""
    # of a Hub repository: branch, tag, commit or refs/pr/N; '': its main branch
    revision: str = ""

    @property
    def loading_base(self) -> dict[str, Any]:
        """Arguments of `models.load_base`."""
        return self.loading | {"revision": self.revision or None}

    @model_validator(mode="after")
    def _has_revisions(self):
        refuse_revision(self.model, self.revision)
        return self
