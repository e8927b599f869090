"""Harm labels: what each plan of a book costs each token, in KL from the dense model.

A batch costs one dense pass and M - 1 passes that are cheaper. Labels stream to disk, a file a
batch, so that an interrupted labelling goes on where it was.

In context, a token's neighbours follow the router and its own plan alone is another (as in DAgger,
Ross et al. 2011): such a pass labels every token under one plan, and the other harms are unknown.

Notation: n tokens that choose, d width, M plans of the book, U routable units.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dlr.measure.instrument import Sample, costs, open_sample
from dlr.measure.static_runs import StaticRuns
from dlr.processes import count, rank, wait
from dlr.progress import tqdm
from dlr.routing.handle import Routing
from dlr.routing.policy import GivenPlan
from dlr.runs import save_tensors


@dataclass
class HarmLabels:
    """Of n tokens: what a router may read of them, and their harms.

    Attributes:
        states: `[n, d]` bfloat16, before layer K.
        position: `[n]` place in the sequence. token: `[n]` id. document: `[n]` place of the text.
        harm: `[n, M]` nats; NaN where a plan was not tried on the token.
        last: `[n, d]` bfloat16, the dense model's last state, for a privileged control.
    """
    states: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    document: torch.Tensor
    harm: torch.Tensor
    last: torch.Tensor

    def __len__(self) -> int:
        return len(self.harm)

    def __getitem__(self, rows) -> "HarmLabels":
        return HarmLabels(*(getattr(self, part.name)[rows] for part in fields(self)))

    @classmethod
    def joined(cls, parts: list["HarmLabels"]) -> "HarmLabels":
        return cls(*(torch.cat([getattr(part, each.name) for part in parts])
                     for each in fields(cls)))


def labels_of(routing: Routing, sample: Sample, harm: torch.Tensor) -> HarmLabels:
    """Labels of `harm` `[n, M]` on a sample of `open_for_labels`."""
    position = (sample.real.cumsum(1) - 1)[sample.free]
    last = sample.states[len(routing.layers)]
    return HarmLabels(sample.states[routing.first].bfloat16(), position.int().cpu(),
                      sample.ids[sample.free].int().cpu(), sample.document.int(), harm.float(),
                      last.bfloat16())


@torch.no_grad()
def label_batch(model, routing: Routing, batch: dict) -> HarmLabels:
    """Labels of one batch of `data.padded_batches` under every plan of the router's book."""
    return label_sample(model, routing, open_for_labels(model, routing, batch))


def open_for_labels(model, routing: Routing, batch: dict) -> Sample:
    """The sample of a batch, with the states that labels hold."""
    return open_sample(model, routing, batch, (routing.first, len(routing.layers)))


def label_sample(model, routing: Routing, sample: Sample) -> HarmLabels:
    """Labels of a sample of `open_for_labels` under every plan of the router's book."""
    runs = StaticRuns(model, routing, sample)
    book = routing.router.gates.cpu()
    harm = [torch.zeros(len(sample)), *(runs.kl(gates, keep=True) for gates in book[1:])]
    return labels_of(routing, sample, torch.stack(harm, -1))


@torch.no_grad()
def label_in_context(model, routing: Routing, batch: dict, moved: float,
                     generator: torch.Generator) -> HarmLabels:
    """Labels of one batch whose tokens follow the router at a random price, one a sequence.

    Args:
        moved: share of the tokens that take a random plan instead.
    """
    sample = open_for_labels(model, routing, batch)
    router, book = routing.router, routing.router.gates.cpu()
    position = (sample.real.cumsum(1) - 1)[sample.free]
    harm = router.harm(sample.states[routing.first].to(position.device), position).cpu()
    skip = 0.7 * torch.rand(len(sample.ids), generator=generator)
    curve = torch.tensor(routing.calibration.curve)
    price = curve[(100 * skip).long()][sample.free.nonzero()[:, 0].cpu()]
    plan = (harm - price.unsqueeze(-1) * router.depths.cpu()).argmin(-1)
    anew = torch.randint(len(book), plan.shape, generator=generator)
    plan = torch.where(torch.rand(plan.shape, generator=generator) < moved, anew, plan)
    with routing.autocast():
        kl, _ = costs(model, routing, sample, GivenPlan(sample.spread(book[plan])))
    found = torch.full((len(plan), len(book)), torch.nan)
    found.scatter_(1, plan.unsqueeze(1), kl.unsqueeze(1))
    found[:, 0] = 0.0
    return labels_of(routing, sample, found)


def blocks_as_batches(blocks: np.ndarray, count: int, size: int) -> list[dict]:
    """Batches of `size` blocks out of blocks of token ids `[n, s]`, `count` tokens or a few more.

    Raises:
        ValueError: there are fewer.
    """
    length = blocks.shape[1]
    needed = -(-count // (length * size)) * size
    if needed > len(blocks):
        raise ValueError(f"{count} tokens were asked for and the training text holds {len(blocks)} "
                         f"blocks of {length} tokens: give more text, or ask for fewer labels "
                         "(label_tokens, context_tokens).")
    batches = []
    for start in range(0, needed, size):
        ids = torch.from_numpy(blocks[start:start + size].astype(np.int64))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                        "row": torch.arange(start, start + size)})
    return batches


def stream(batches: list[dict], make, folder: Path, describe: str) -> HarmLabels:
    """`make(batch)` of every batch, each kept in `folder` as it comes; those there are read again.

    Several processes share the batches, and go on once all are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(batches))]
    mine = slice(rank(), None, count())
    for path, batch in zip(tqdm(paths[mine], desc=describe, unit="batch"), batches[mine]):
        if not path.is_file():
            labels = make(batch)
            save_tensors({part.name: getattr(labels, part.name).contiguous()
                          for part in fields(HarmLabels)}, path)
    wait()
    return HarmLabels.joined([HarmLabels(**load_file(path)) for path in paths])
