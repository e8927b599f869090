"""What a router did on the tokens a benchmark scores: a watch that fails closed, and a meter.

Notation: b rows, s width, U routable units. A position is *scored* where its logits decide the
answer, *context* where it is a real token before that (prompt, few-shot examples), and *padding*
otherwise.
"""

import contextlib
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from dlr.routing.policy import Policy, RouterPolicy


class RouterDidNotRun(RuntimeError):
    """A pass of a routed model made no plan, so its scores would be those of another model."""


class Watched(Policy):
    """A policy that is told which positions are real: the harness pads and passes no mask."""

    def __init__(self, inner: Policy):
        self.inner, self.reads_hidden = inner, inner.reads_hidden
        self.real: torch.Tensor | None = None

    def check(self, routing, plan):
        if self.real is not None:
            plan.real = self.real
        self.inner.check(routing, plan)

    def ahead(self, routing):
        return self.inner.ahead(routing)

    def step(self, routing, hidden, unit):
        return self.inner.step(routing, hidden, unit)

    def __call__(self, routing, hidden, plan):
        return self.inner(routing, hidden, plan)


class Watch:
    """Collects the gates of every forward pass, and raises where one has none.

    Its own hook on the decoder, independent of the router's, sees passes that the router missed.
    """

    def __init__(self, routing, policy: Policy):
        end_watch(routing)               # first, for it puts the policy of before back
        self._before = routing.policy
        self.routing = routing
        self.policy = Watched(policy)
        self.passes: list[torch.Tensor] = []
        self._asleep = False
        routing.policy = self.policy
        self._seen = routing.plan
        self._handle = routing.decoder.register_forward_hook(self._after)
        # detaching leaves no hook behind; `taken` then finds no pass
        routing.handles.append(self._handle)
        routing.watch = self

    def _after(self, module, args, output):
        if self._asleep:
            return
        plan = self.routing.plan
        replaced = self.routing.policy is not self.policy
        routed = isinstance(self.policy.inner, RouterPolicy)
        unrouted = routed and plan is not None and plan.logits is None
        if plan is None or plan is self._seen or replaced or unrouted:
            raise RouterDidNotRun("The model ran without its router: no plan was made in this "
                                  "forward pass. The router is detached, or another policy was put "
                                  "in its place (Routing.using, Routing.disabled).")
        self._seen = plan
        self.passes.append(plan.gates > 0.5)

    def begin(self, real: torch.Tensor | None, keys: list[str]) -> None:
        """A new batch: which positions are real, and the name of each row's document."""
        self.passes = []
        self.policy.real = real
        if hasattr(self.policy.inner, "keys"):
            self.policy.inner.keys = keys

    def taken(self, rows: int) -> list[torch.Tensor]:
        """Gates `[b, s, U]` bool of each pass since `begin`; RouterDidNotRun if a row has none."""
        if not self.passes or any(len(gates) != rows for gates in self.passes):
            raise RouterDidNotRun(f"The router ran in {len(self.passes)} passes on "
                                  f"{[len(g) for g in self.passes]} rows; {rows} requests were "
                                  "sent. Some were answered without it.")
        return self.passes

    @contextlib.contextmanager
    def asleep(self):
        """In this block the model runs dense and unwatched; what it gives there is no score."""
        self._asleep = True
        try:
            with self.routing.at(policy=None):
                yield
        finally:
            self._asleep = False

    def close(self) -> None:
        """Takes the hook off; the policy of before is in force again."""
        self._handle.remove()
        self.routing.policy, self.routing.watch = self._before, None


def end_watch(routing) -> None:
    """Closes the watch of an earlier harness model on the same routing, if there is one."""
    if getattr(routing, "watch", None) is not None:
        routing.watch.close()


@dataclass
class Meter:
    """Sums over requests. `kept`, `context_kept` count the positions that ran each unit."""
    units: int = 0
    requests: int = 0
    truncated: int = 0                  # longer than the model's context, cut on the left
    scored: int = 0
    context: int = 0
    padding: int = 0
    # scored positions that run every unit whatever the plan (kept first tokens)
    forced: int = 0
    # summed over scored positions: tokens each attends to, itself included
    reach: int = 0
    kept: list[int] = field(default_factory=list)
    context_kept: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.kept = self.kept or [0] * self.units
        self.context_kept = self.context_kept or [0] * self.units

    def add(self, gates: torch.Tensor | None, scored: torch.Tensor, real: torch.Tensor,
            position: torch.Tensor, first: int = 0) -> None:
        """Adds a pass: gates `[b, s, U]` bool (None: dense), masks and places in the row `[b, s]`.

        Below place `first` tokens run every unit."""
        context = real & ~scored
        self.scored += int(scored.sum())
        self.context += int(context.sum())
        self.padding += int((~real).sum())
        self.forced += int((scored & (position < first)).sum()) if self.units else 0
        self.reach += int((position + 1)[scored].sum())
        if self.units:
            ran = torch.ones(*real.shape, self.units,
                             dtype=torch.bool) if gates is None else gates.cpu()
            self.kept = (torch.tensor(self.kept) + ran[scored].sum(0)).tolist()
            self.context_kept = (torch.tensor(self.context_kept) + ran[context].sum(0)).tolist()

    def __add__(self, other: "Meter") -> "Meter":
        """Both together; a task that has met no router counts no unit."""
        def added(name: str) -> list[int]:
            return [sum(pair) for pair in zip_longest(getattr(self, name), getattr(other, name),
                                                      fillvalue=0)]

        sums = {name: getattr(self, name) + getattr(other, name) for name in
                ("requests", "truncated", "scored", "context", "padding", "forced", "reach")}
        return Meter(max(self.units, other.units), **sums, kept=added("kept"),
                     context_kept=added("context_kept"))

    def _skipped(self, kept: list[int], positions: int) -> float | None:
        if not self.units or not positions:
            return None
        return 1 - sum(kept) / (positions * self.units)

    @property
    def skip(self) -> float:
        """1 - mean gate over scored positions and units."""
        return self._skipped(self.kept, self.scored) or 0.0

    @property
    def context_skip(self) -> float | None:
        """The same over prompt and few-shot examples; None where there were none."""
        return self._skipped(self.context_kept, self.context)

    @property
    def keep_rate(self) -> list[float]:
        """Share of scored positions that ran each unit."""
        return [count / self.scored for count in self.kept] if self.scored else []

    @property
    def forced_share(self) -> float:
        return self.forced / self.scored if self.scored else 0.0

    @property
    def mean_reach(self) -> float:
        """Mean number of tokens a scored position attends to."""
        return self.reach / self.scored if self.scored else 0.0
