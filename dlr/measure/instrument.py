"""What a plan costs each token of a sample, in KL from the dense model and in loss.

Notation: b batch, s sequence, U routable units, n tokens that choose: those with a next token, kept
first tokens left out. All KL and losses are in nats.
"""

import contextlib
from dataclasses import dataclass

import torch

from dlr.base.adapters import without_adapters
from dlr.measure.likelihood import ROWS, frozen_base, predicted
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.policy import GivenPlan, Policy, RouterPolicy


@dataclass
class Sample:
    """One batch of text, what the dense model says about it, and which of its tokens choose."""
    ids: torch.Tensor             # [b, s]
    real: torch.Tensor            # [b, s] bool
    free: torch.Tensor            # [b, s] bool, the n tokens that choose
    document: torch.Tensor        # [n] index of the text
    teacher: torch.Tensor         # [n, V] probabilities of the dense model
    teacher_entropy: torch.Tensor  # [n] nats
    target: torch.Tensor          # [n] ids of the next tokens
    states: dict[int, torch.Tensor]   # layers run -> [n, d] states, where asked for

    def __len__(self) -> int:
        return len(self.document)

    def full(self, units: int) -> torch.Tensor:
        """The plan `[b, s, U]` that runs everything."""
        return torch.ones(*self.ids.shape, units, device=self.ids.device)

    def spread(self, plan: torch.Tensor) -> torch.Tensor:
        """Gates `[n, U]` or `[U]` of the choosing tokens as a plan `[b, s, U]`; others run all."""
        gates = self.full(plan.shape[-1])
        gates[self.free] = plan.to(gates)
        return gates


@torch.no_grad()
def open_sample(model, routing: Routing, batch: dict, depths: tuple[int, ...] = ()) -> Sample:
    """Runs the dense model (adapters off) once on a batch of `data.padded_batches`.

    Args:
        depths: numbers of layers after which states are kept; 0 is the embedding.

    Raises:
        ValueError: no token of the batch chooses.
    """
    device = device_of(model)
    ids, real = batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()
    free = torch.zeros_like(real)
    free[:, :-1] = predicted(real)
    free &= real.cumsum(1) - 1 >= routing.config.keep_first_tokens
    if not free.any():
        raise ValueError("No token of this batch chooses its layers: its texts are shorter than "
                         "keep_first_tokens + 2 tokens. Give longer texts.")
    with routing.autocast(), frozen_base(model, routing):
        out = model(input_ids=ids, attention_mask=real.long(), use_cache=False,
                    output_hidden_states=bool(depths))
    log_p = out.logits[free].float().log_softmax(-1)
    teacher = log_p.exp()
    document = batch["row"].to(device).unsqueeze(1).expand_as(ids)[free].cpu()
    states = {depth: out.hidden_states[depth][free].float().cpu() for depth in depths}
    return Sample(ids, real, free, document, teacher, teacher_entropy=-(teacher * log_p).sum(-1),
                  target=ids.roll(-1, 1)[free], states=states)


def costs(model, routing: Routing, sample: Sample,
          policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """KL from the dense model and loss `[n]` of the choosing tokens under `policy`."""
    with routing.using(policy):
        logits = model(input_ids=sample.ids, attention_mask=sample.real.long(),
                       use_cache=False).logits
    rows = logits[sample.free]
    kl, loss = [], []
    for start in range(0, len(rows), ROWS):
        chunk = slice(start, start + ROWS)
        part = rows[chunk].float()
        normaliser = part.logsumexp(-1)
        expected = (sample.teacher[chunk] * part).sum(-1)
        kl.append(normaliser - expected - sample.teacher_entropy[chunk])
        loss.append(normaliser - part.gather(1, sample.target[chunk, None]).squeeze(1))
    return torch.cat(kl).cpu(), torch.cat(loss).cpu()


@contextlib.contextmanager
def giving(layer, output):
    """For the duration `layer` gives back `output`, whatever it is called with."""
    before = vars(layer).get("forward")    # one of its own, where accelerate dispatched the model
    layer.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextlib.contextmanager
def recording(layers):
    """For the duration each layer's raw output is put into the list that is yielded."""
    outputs = [None] * len(layers)
    handles = [layer.register_forward_hook(
        lambda module, args, output, _place=place: outputs.__setitem__(_place, output),
        prepend=True) for place, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Instrument:
    """Measures plans on one sample; a pass that differs in a late unit reuses the layers before.

    Args:
        adapters: with the checkpoint's LoRA, or on the base model's own weights.
    """

    def __init__(self, model, routing: Routing, sample: Sample, adapters: bool = True):
        self.model, self.routing, self.sample, self.adapters = model, routing, sample, adapters
        self.kept: list = []              # each layer's raw output under the base plan
        self.passes = 0

    @contextlib.contextmanager
    def setting(self):
        """No gradients, the adapters asked for, and masked execution, which is the reference."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.routing.at(execution="masked"))
            stack.enter_context(self.routing.autocast())
            stack.enter_context(torch.no_grad())
            if not self.adapters:
                stack.enter_context(without_adapters(self.model, self.routing))
            yield

    @contextlib.contextmanager
    def _reusing(self, layers: int):
        """The first `layers` decoder layers give back what they computed under the base plan."""
        with contextlib.ExitStack() as stack:
            for layer, output in zip(self.routing.layers[:layers], self.kept):
                stack.enter_context(giving(layer, output))
            yield

    def _run(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.passes += 1
        return costs(self.model, self.routing, self.sample, GivenPlan(gates))

    def base(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and loss `[n]` under a plan `[b, s, U]`, which later calls of `without` start from."""
        with recording(self.routing.layers) as self.kept, self.setting():
            return self._run(gates)

    def without(self, gates: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and loss `[n]` where the plan given to `base` skips `unit` at every choosing token."""
        changed = gates.clone()
        changed[..., unit] = torch.where(self.sample.free, 0.0, changed[..., unit])
        layer, part = divmod(unit, self.routing.units_per_layer)
        unchanged = self.routing.first + layer + (self.routing.units_per_layer == 1)
        with self.setting(), self._reusing(unchanged):
            return self._run(changed)


def single_skips(instrument: Instrument, background: torch.Tensor
                 | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What skipping each unit alone adds to KL and loss, `[n, U]` each; `background`: all run."""
    units = instrument.routing.units
    gates = instrument.sample.full(units) if background is None else background
    kl, loss = instrument.base(gates)
    skipped = [instrument.without(gates, unit) for unit in range(units)]
    return (torch.stack([kl_without - kl for kl_without, _ in skipped], -1),
            torch.stack([loss_without - loss for _, loss_without in skipped], -1))


def router_plan(instrument: Instrument, threshold: float) -> torch.Tensor:
    """The router's own gates `[n, U]` at a threshold, on the weights the instrument measures."""
    routing, sample = instrument.routing, instrument.sample
    with instrument.setting(), routing.at(policy=RouterPolicy(), threshold=threshold):
        instrument.model(input_ids=sample.ids, attention_mask=sample.real.long(), use_cache=False)
    return (routing.plan.gates[sample.free] > 0.5).cpu()
