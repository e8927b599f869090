"""How many requests go through the model at once: a number, or as many as fit."""

import contextlib

import torch
from accelerate.utils import find_executable_batch_size, gather_object
from lm_eval.models.huggingface import HFLM

from dlr.settings import SettingsError

MOST = 64                   # rows that 'auto' begins to try at


def split(order: list[int], size: int) -> list[list[int]]:
    return [order[start:start + size] for start in range(0, len(order), size)]


class Sizes:
    """The size of a batch by the width of its rows, equal in all processes.

    Args:
        asked: requests a batch, or 'auto'; most: bounds 'auto', None is MOST.

    Raises:
        SettingsError: `most` is given beside a number.
    """

    def __init__(self, asked: int | str, most: int | None):
        if most is not None and asked != "auto":
            raise SettingsError(f"max_batch_size={most} bounds batch_size='auto' and has no effect "
                                f"beside batch_size={asked}; leave one of them out.")
        self.asked, self.most = asked, most or MOST
        self._fitting: dict[int, int] = {}

    def of(self, lm, width: int) -> int:
        """Requests a batch of rows of up to `width` tokens; asked anew where rows are longer."""
        if self.asked != "auto":
            return self.asked
        if lm.device.type == "cpu":         # nothing is refused there before the machine swaps
            return self.most
        if width not in self._fitting:
            self._fitting[width] = min(gather_object([fitting(lm, width, self.most)]))
        return self._fitting[width]


def fitting(lm, width: int, most: int) -> int:
    """The most rows of `width` tokens, up to `most`, that `lm`'s device holds; at least one.

    They run dense, with logits and cache at every place, which no plan and no answer exceeds by
    more than a few per cent.
    """
    @find_executable_batch_size(starting_batch_size=most)
    def probe(size: int) -> int:
        ids = torch.ones(size, width, dtype=torch.long, device=lm.device)
        torch.log_softmax(HFLM._model_call(lm, ids), -1, dtype=lm.softmax_dtype)
        return size
    with lm.watch.asleep() if lm.watch is not None else contextlib.nullcontext():
        try:
            return probe()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            return 1                        # the batch itself then says what it lacks
