"""Where gates come from: the router itself, or one of the plans it is compared with.

A policy maps states before layer K `[b, s, d]` to gates `[b, s, U]`, and logits where it has them.
"""

import torch

from dlr.routing.router import hard_gates


class Policy:
    """A source of gates. `reads_hidden`: whether the two-pass strategy needs a first pass."""
    reads_hidden = False

    def check(self, routing, plan) -> None:
        """Raises ValueError, before anything is computed, where a pass (`plan`) does not fit."""

    def ahead(self, routing) -> bool:
        """Whether all gates are decided before layer K; otherwise `step` is asked for each unit."""
        return True

    def __call__(self, routing, hidden: torch.Tensor, plan) -> tuple:
        """(gates `[b, s, U]`, logits `[b, s, U]` or None) from the states before layer K."""
        raise NotImplementedError


def refuse_without_plan(routing, what: str) -> None:
    """Raises ValueError where the router decides layer by layer: `what` needs its plan ahead."""
    if not routing.router.ahead:
        raise ValueError(f"{what} needs all decisions before the first routable layer, and "
                         f"{type(routing.router).__name__} decides on each layer from the state "
                         "before it.")


class RouterPolicy(Policy):
    """The router's own plan: differentiable while `training`, with noise of scale `noise`.

    With a cache, a step of one token a sequence follows `routing.decode_plan`:
        'exact': every token by its own logits, as in one pass without a cache.
        'consensus': the batch decides together, by its mean logits, as many units as its tokens
            would keep on average; whole layers then drop out of the step. A sequence's text depends
            on its batch.
        'prompt': the same decision, made once over the newest prefill and kept for all steps after.
    Below a few hundred rows a batched step reads every weight of a layer that any row runs, so that
    'exact' saves arithmetic but little time; the other two save both. Candidates of assisted
    decoding are steps, several at a time.
    """
    reads_hidden = True

    def __init__(self, training: bool = False, temperature: float = 1.0, noise: float = 1.0):
        self.training, self.temperature, self.noise = training, temperature, noise

    def check(self, routing, plan) -> None:
        if plan.cache is not None and not routing.router.causal:
            raise ValueError(f"{type(routing.router).__name__} compares all tokens of a sequence "
                             "before it decides on any, so that no pass can go on from a key/value "
                             "cache: pass use_cache=False.")
        pools = routing.config.level == "sequence"
        if plan.cache is None or not (pools or routing.decode_plan == "prompt"):
            return
        remembered = plan.memory.pool if pools else plan.memory.prompt
        if remembered is not None or (not pools and plan.new > 1):
            return
        past = bool(plan.cache.get_seq_length() > 0) if plan.past is None else plan.past
        if past:
            what = "level='sequence' decides by a sequence's first tokens" if pools else \
                "decode_plan='prompt' fixes the plan at prefill"
            raise ValueError(f"{what}, and this key/value cache was filled without that (by the "
                             "dense model, or under another decode_plan). Start again with an "
                             "empty cache.")

    def ahead(self, routing):
        return routing.router.ahead

    def step(self, routing, hidden: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate, logit) `[b, s, 1]` of one unit from the state before its layer."""
        return routing.router.step(hidden, unit, routing.current, routing.threshold,
                                   self.temperature if self.training else None, self.noise)

    def threshold(self, routing, hidden: torch.Tensor) -> float | torch.Tensor:
        """The threshold in force, one for all or `[b, 1, 1]`."""
        return routing.threshold

    def __call__(self, routing, hidden, plan):
        config = routing.config
        pools = config.level == "sequence"
        states, position = (self._pooled(routing, hidden, plan), None) if pools else \
            (hidden, plan.position)
        threshold = self.threshold(routing, hidden)
        if self.training:
            gates, logits = routing.router.draw(states, position, threshold, self.temperature,
                                                self.noise)
        else:
            plan.harm, logits = routing.router.judged(states, position)
            gates = hard_gates(logits, threshold)
        if self.training and pools:
            gates = gates[:, :1].expand_as(gates)             # one draw a sequence
        if pools:
            gates = plan.opened(gates, config.pool_tokens)
        elif routing.decode_plan != "exact" and not self.training:
            gates = self._together(routing, logits, gates, plan)
        return gates, logits

    def _pooled(self, routing, hidden, plan) -> torch.Tensor:
        """The mean state `[b, s, d]` of the first tokens, which therefore run every layer.

        Pooling the whole sequence, as the original did, would let later tokens decide how earlier
        ones are computed. A cache keeps the states of the first tokens, so that a prompt shorter
        than the pool is completed by what follows.
        """
        size = routing.config.pool_tokens
        batch, length, width = hidden.shape
        # tokens that are not among the first share one further place, `size`
        place = torch.where(plan.real, plan.position, size).clamp(0, size)
        earlier = plan.memory.pool
        if earlier is None:
            earlier = hidden.new_zeros(batch, size + 1, width)
        states = earlier.scatter(1, place.unsqueeze(-1).expand(-1, -1, width), hidden)
        plan.memory.pool = states.detach()
        count = (torch.where(plan.real, plan.position, 0).amax(1) + 1).clamp(1, size)
        within = (torch.arange(size, device=hidden.device) < count.unsqueeze(1)).unsqueeze(-1)
        mean = (states[:, :size].float() * within).sum(1) / count.unsqueeze(1)
        return mean.to(hidden.dtype).unsqueeze(1).expand(-1, length, -1)

    def _together(self, routing, logits, gates, plan) -> torch.Tensor:
        """Gates that the batch shares in a decode step; 'prompt' decides them in a longer pass."""
        new = plan.new
        memory = plan.memory
        if routing.decode_plan == "consensus":
            step = plan.cache is not None and logits.shape[1] == 1
            return _shared_gates(logits, gates, plan.real).expand_as(gates) if step else gates
        if memory.prompt is not None and new == 1:
            return memory.prompt.expand_as(gates)
        prompt_gates = gates[:, :new]
        memory.prompt = _shared_gates(logits[:, :new], prompt_gates, plan.real[:, :new])
        return torch.cat([prompt_gates, memory.prompt.expand_as(gates[:, new:])], 1)


def _shared_gates(logits: torch.Tensor, gates: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Gates `[U]`: the units of the highest mean logits, as many as real tokens keep on average."""
    weight = real.unsqueeze(-1).float()
    total = weight.sum().clamp(min=1)
    kept = ((gates * weight).sum() / total).round()
    rank = ((logits.float() * weight).sum((0, 1)) / total).argsort(descending=True).argsort()
    return (rank < kept).float()


class StaticPlan(Policy):
    """One gate vector `[U]` for every token."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates.float()

    def check(self, routing, plan):
        if self.gates.shape != (routing.units,):
            raise ValueError(f"A static plan for this model has {routing.units} gates; "
                             f"{tuple(self.gates.shape)} given.")

    def __call__(self, routing, hidden, plan):
        return self.gates.to(hidden.device).expand(*hidden.shape[:2], -1), None


class MixedStaticPlan(Policy):
    """Two neighbouring static plans `[U]`, of which each sequence draws one, to meet a budget."""

    def __init__(self, fewer: torch.Tensor, more: torch.Tensor, share_more: float):
        self.plans, self.share_more = torch.stack([fewer, more]).float(), share_more

    def draws(self, hidden: torch.Tensor) -> torch.Tensor:
        """A number in [0, 1) for each sequence of the batch."""
        return torch.rand(hidden.shape[0], device=hidden.device)

    def __call__(self, routing, hidden, plan):
        more = (self.draws(hidden) < self.share_more).long()
        return self.plans.to(hidden.device)[more].unsqueeze(1).expand(-1, hidden.shape[1], -1), None


class RandomPlan(Policy):
    """Every token keeps every unit with probability 1 - skip, from a generator of its own."""

    def __init__(self, skip: float | torch.Tensor, seed: int = 0):
        self.skip, self.generator = skip, torch.Generator().manual_seed(seed)

    def __call__(self, routing, hidden, plan):
        draw = torch.rand(*hidden.shape[:2], routing.units, generator=self.generator)
        return (draw >= self.skip).float().to(hidden.device), None


class LayerDrop(Policy):
    """Stochastic depth (Huang et al. 2016; Fan et al. 2020): units are dropped at random.

    Args:
        probability: that a unit is dropped, in the mean over units.
        schedule: 'uniform', or 'linear': it rises with depth as in Huang et al., from near 0 on, so
            far as no unit is dropped always.
        level: what draws by itself, a 'batch', a 'sequence' or a 'token'.
    """

    def __init__(self, probability: float, schedule: str = "uniform", level: str = "sequence"):
        self.probability, self.schedule, self.level = probability, schedule, level

    def probabilities(self, units: int) -> torch.Tensor:
        """`[U]`, whose mean is `probability`."""
        if self.schedule == "uniform":
            return torch.full((units,), self.probability)
        place = torch.arange(1, units + 1) / (units + 1)                     # 0.5 in the mean
        if self.probability <= 0.5:
            return 2 * self.probability * place
        return 1 - 2 * (1 - self.probability) * (1 - place)

    def __call__(self, routing, hidden, plan):
        batch, length = hidden.shape[:2]
        draws = 1 if self.level == "batch" else batch, length if self.level == "token" else 1
        draw = torch.rand(*draws, routing.units, device=hidden.device)
        gates = (draw >= self.probabilities(routing.units).to(draw)).float()
        return gates.expand(batch, length, -1), None


class ShuffledPlan(Policy):
    """The router's plan, shuffled among the batch's real tokens: the keep rates stay the same."""
    reads_hidden = True

    def __init__(self, seed: int = 0):
        self.router, self.generator = RouterPolicy(), torch.Generator().manual_seed(seed)

    def check(self, routing, plan):
        refuse_without_plan(routing, "A shuffled plan")
        self.router.check(routing, plan)

    def __call__(self, routing, hidden, plan):
        gates, logits = self.router(routing, hidden, plan)
        movable = plan.real & (plan.position >= routing.config.keep_first_tokens)
        gates = gates.clone()
        rows = gates[movable]
        gates[movable] = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]
        return gates, logits


class GivenPlan(Policy):
    """Gates `[b, s, U]` made beforehand, for this very batch."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates.float()

    def check(self, routing, plan):
        expected = (*plan.real.shape, routing.units)
        if tuple(self.gates.shape) != expected:
            raise ValueError(f"This plan has shape {tuple(self.gates.shape)}; the pass needs "
                             f"[b, s, units] = {expected}. A pass that goes on from a cache needs "
                             "the gates of its new tokens only.")

    def __call__(self, routing, hidden, plan):
        return self.gates.to(hidden.device), None


class RecordedPlan(Policy):
    """Runs the router, for its cost, and follows recorded gates `[n, U]`, token by token."""
    reads_hidden = True

    def __init__(self, gates: torch.Tensor):
        self.gates = gates.float()
        self.next = 0

    def check(self, routing, plan):
        refuse_without_plan(routing, "A recorded plan")

    def __call__(self, routing, hidden, plan):
        logits = routing.router(hidden, plan.position)
        batch, length = hidden.shape[:2]
        index = (self.next + torch.arange(batch * length)) % len(self.gates)
        if not plan.first_pass:
            self.next = int(index[-1]) + 1
        return self.gates[index].view(batch, length, -1).to(hidden.device), logits
