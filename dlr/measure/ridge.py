"""Skip adapters in closed form: reduced-rank ridge regression of each layer's update.

One dense pass over some thousand tokens; no gradients. The input of a layer is normed as
`routing.skip` norms it, so that the ridge penalty means the same in every layer. The low rank keeps
the directions in which the full-rank prediction varies most (reduced-rank regression, Izenman
1975).

Notation: d width, U routable layers, r rank, n tokens.
"""

import torch
import torch.nn.functional as F

from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import last_only
from dlr.progress import tqdm
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.skip import normed

RIDGE = 1e-2         # times n; inputs have a mean square of 1


class _Moments:
    """A forward hook that sums a layer's second moments over the tokens that choose."""

    def __init__(self, width: int, device):
        self.inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.updates = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        self.total = self.count = 0
        self.rows = None              # [b, s] bool, set for each batch

    def __call__(self, module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, (tuple, list)) else output
        before, after = (state[self.rows.to(state.device)].float() for state in (before, after))
        x = F.pad(normed(before), (0, 1), value=1.0)
        self.inputs += (x.T @ x).to(self.inputs)
        self.updates += (x.T @ (after - before)).to(self.updates)
        self.total += float((after - before).square().sum())
        self.count += len(x)


@torch.no_grad()
def fit_skip_adapters(model, routing: Routing, batches: list[dict]) -> list[float]:
    """Sets the skip adapters to the ridge fit of the frozen base on `batches`.

    Args:
        batches: input_ids and attention_mask `[b, s]`, as of `data.padded_batches`.

    Returns:
        The share of each layer's squared update that its adapter explains, on these tokens.

    Raises:
        ValueError: there are no adapters (skip_adapter_rank=0), or units are sublayers.
    """
    adapters = routing.router.skip
    if adapters is None or routing.units_per_layer != 1:
        raise ValueError("Skip adapters need skip_adapter_rank above 0 and unit='layer'; this "
                         f"router has skip_adapter_rank={routing.config.skip_adapter_rank} and "
                         f"unit={routing.config.unit!r}.")
    device = device_of(model)
    moments = [_Moments(routing.router.width, device) for _ in range(routing.units)]
    handles = [layer.register_forward_hook(each, with_kwargs=True) for layer, each in
               zip(routing.layers[routing.first:routing.last], moments)]
    try:
        for batch in tqdm(batches, desc="fitting skip adapters", unit="batch"):
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            chooses = mask.bool() & (mask.cumsum(1) - 1 >= routing.config.keep_first_tokens)
            for each in moments:
                each.rows = chooses
            with routing.autocast(), frozen_base(model, routing):
                model(input_ids=ids, attention_mask=mask, use_cache=False, **last_only(model))
    finally:
        for handle in handles:
            handle.remove()
    explained = []
    for unit, each in enumerate(moments):
        fit = _ridge(each, adapters.rank)
        for parameter, value in zip((adapters.down, adapters.shift, adapters.up), fit[:3]):
            parameter[unit].copy_(value)
        explained.append(fit[3])
    return explained


def _ridge(moments: _Moments, rank: int) -> tuple:
    """(down `[r, d]`, shift `[r]`, up `[d, r]`, share explained) of one layer."""
    inputs, updates = moments.inputs, moments.updates
    penalty = RIDGE * moments.count * torch.eye(len(inputs), dtype=inputs.dtype,
                                                device=inputs.device)
    full = torch.linalg.solve(inputs + penalty, updates)                       # [d + 1, d]
    _, directions = torch.linalg.eigh(full.T @ inputs @ full)
    up = directions[:, -rank:]
    down = (full @ up).T
    if down.shape[0] < rank:                                 # a rank above the width adds nothing
        down, up = (F.pad(part, pad) for part, pad in
                    ((down, (0, 0, 0, rank - len(down))), (up, (0, rank - up.shape[1]))))
    fitted = down.T @ up.T
    gain = 2 * (fitted * updates).sum() - (fitted * (inputs @ fitted)).sum()
    return down[:, :-1], down[:, -1], up, float(gain) / max(moments.total, 1e-30)
