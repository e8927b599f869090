"""Keys and values that are owed: a cache layer that fills itself when it is read.

A decode step in which every token skips a layer need not read that layer's weights. The layer's
inputs wait here. When the layer next runs, its K/V product includes them (with sublayer units they
get a product of their own). Any other reader (another execution, a crop, a beam reordering, a copy
of the cache) finds the whole cache, because reading completes it.
"""

import torch
from transformers.cache_utils import DynamicLayer

from dlr.routing.families import POSITIONS


def positional(kwargs: dict) -> dict:
    """The arguments of a layer that belong to positions, and so must wait with its inputs."""
    return {name: kwargs[name] for name in POSITIONS if kwargs.get(name) is not None}


def by_row(kwargs: dict, hidden: torch.Tensor) -> bool:
    """Whether rows can be chosen from positional arguments `[s]`, `[1 or b, s]`, `[1 or b, s, e]`.

    Vision-language models give each token three places (`[3, b, s, e]`): they run part by part.
    """
    batch, length = hidden.shape[:2]
    return all(_by_row(value, name, batch, length) for name, value in positional(kwargs).items())


def _by_row(value, name: str, batch: int, length: int) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_by_row(part, name, batch, length) for part in value)
    if value.dim() == 1:
        return value.shape[0] == length
    dimensions = 3 if name == "position_embeddings" else 2
    return value.dim() == dimensions and value.shape[0] in (1, batch) and value.shape[1] == length


def joined(parts: list):
    """Tensors (or tuples of them) of several calls, joined to those of one call."""
    if isinstance(parts[0], (tuple, list)):
        return type(parts[0])(joined(list(column)) for column in zip(*parts))
    if parts[0].dim() == 1:
        return torch.cat(parts)
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], 1)


def behind(waiting: list, hidden: torch.Tensor, places: dict) -> tuple[torch.Tensor, dict]:
    """Inputs `[b, n + s, d]` and places of earlier calls, those of this one at their end."""
    if not waiting:
        return hidden, places
    inputs = torch.cat([*(earlier for earlier, _ in waiting), hidden], 1)
    return inputs, {name: joined([*(earlier[name] for _, earlier in waiting), part])
                    for name, part in places.items()}


class PendingLayer(DynamicLayer):
    """A DynamicLayer some of whose newest entries are still inputs. Made from one by `owe`."""

    def owe(self, hidden: torch.Tensor, positions: dict) -> None:
        """Adds inputs `[b, s, d]` whose keys and values are owed."""
        self.waiting.append((hidden, positions))

    def take(self) -> list:
        """Hands over what waits, for the layer's own next run to project."""
        taken, self.waiting = self.waiting, []
        return taken

    def complete(self) -> None:
        """Projects what waits now."""
        if self.waiting:
            waiting = self.take()
            try:
                hidden = torch.cat([hidden for hidden, _ in waiting], 1)
                positions = {name: joined([earlier[name] for _, earlier in waiting])
                             for name in waiting[0][1]}
                self.project(self, hidden, positions)
            except BaseException:               # after an interrupt too, they are still owed
                self.waiting = waiting
                raise

    def __reduce_ex__(self, protocol):
        """Copies and pickles are plain layers with nothing owed and no link to the model."""
        self.complete()
        state = {name: value for name, value in self.__dict__.items()
                 if name not in ("waiting", "project")}
        return object.__new__, (DynamicLayer,), state

    @property
    def keys(self):
        self.complete()
        return self.__dict__["keys"]

    @keys.setter
    def keys(self, value):
        self.__dict__["keys"] = value

    @property
    def values(self):
        self.complete()
        return self.__dict__["values"]

    @values.setter
    def values(self, value):
        self.__dict__["values"] = value

    def get_seq_length(self) -> int:
        stored = self.__dict__["keys"]
        length = stored.shape[-2] if self.is_initialized and stored.numel() else 0
        return length + sum(hidden.shape[1] for hidden, _ in self.waiting)

    def crop(self, tokens_to_remove: int) -> None:
        self.complete()
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.waiting = []
        super().reset()


def pending_layer(cache, index: int, project) -> PendingLayer | None:
    """Layer `index` of `cache` as one that can owe, or None where the cache is of another kind."""
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return None
    if index >= len(layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    layer = layers[index] if index < len(layers) else None
    if type(layer) is DynamicLayer:
        layer.__class__ = PendingLayer
        layer.waiting = []
        layer.project = project
    return layer if type(layer) is PendingLayer else None
