"""Budgets on the layers run: a class each, found by the name that a run's settings give.

A new objective is one class: a subclass of `Objective` with a `name`, here or in a file that is
imported before the settings are made.

    class Squared(Objective, name="squared"):
        class Weights(Settings):
            weight: float = Field(8.0, ge=0.0)          # given as weights={"weight": 4.0}

        def term(self, plan):
            return self.weights.weight * (1 - plan.budget - self.config.target_skip) ** 2
"""

from typing import ClassVar

import torch
from pydantic import Field

from dlr.processes import gathered
from dlr.routing.budget import Controller, calibration_curve
from dlr.routing.plan import Plan, binary_entropy
from dlr.settings import Settings, SettingsError, validated

RECENT = 16           # steps whose logits price an elastic budget
SLOPE = "slope"       # of the skip ratio over the threshold, from the logistic noise of drawn gates


class Objective:
    """What a budget adds to the loss and does after each step; this one adds and does nothing.

    Args:
        config: the run's settings; `config.weights` holds what has no setting of its own.

    Attributes:
        Weights: what the budget can be told, with its defaults.
        calibrates: whether a threshold is chosen on held-out text once the training is done.
    """
    Weights: ClassVar[type[Settings]] = Settings
    calibrates: ClassVar[bool] = False

    def __init_subclass__(cls, name: str, **options):
        super().__init_subclass__(**options)
        OBJECTIVES[name] = cls

    def __init__(self, config):
        self.config = config
        self.weights = self.weights_of(config)
        ramp = 0 if config.warm_start else round(config.ramp * config.steps)
        self.controller = Controller(config.target_skip, config.dual_rate, ramp)

    @classmethod
    def weights_of(cls, config) -> Settings:
        """The class's weights under a run's settings.

        Raises:
            SettingsError: `config.weights` holds an unknown one, a setting, or a wrong value.
        """
        names = cls.Weights.model_fields.keys() & type(config).model_fields.keys()
        settings = {name: getattr(config, name) for name in names}
        for name in settings.keys() & config.weights.keys():
            raise SettingsError(f"{name} is a setting of its own; give {name}, not weights")
        given = {} if cls is Objective else config.weights      # a control's run has no budget
        return validated(settings | given, cls.Weights)

    @property
    def router_steps(self) -> int:
        """Steps in which the router learns by gradients, counted from the first."""
        return self.config.steps

    def term(self, plan: Plan) -> torch.Tensor:
        """What is added to a pass's loss, in nats; `plan.gates` `[b, s, U]` carry gradients."""
        return torch.zeros((), device=plan.gates.device)

    def after_step(self, routing, step: int, row: dict) -> None:
        """Called after optimizer step `step` (1 = first) with its log row."""


OBJECTIVES: dict[str, type[Objective]] = {}


class Controlled(Objective, name="controlled"):
    """No term in the loss: the controller moves the threshold until the skip meets its target.

    An elastic budget has no target: every skip ratio has the price at which the router's latest
    logits give it.
    """
    calibrates = True

    def __init__(self, config):
        super().__init__(config)
        self._recent: list[torch.Tensor] = []      # logits `[n, U]` of the latest steps

    @property
    def router_steps(self) -> int:
        share = self.config.router_share if self.config.warm_start else 1
        return round(share * self.config.steps)

    def after_step(self, routing, step, row):
        if step > self.router_steps:
            return
        calibration = routing.calibration
        if self.config.elastic:
            calibration.curve = self._curve(routing)
        else:
            calibration.threshold = self.controller.update(
                calibration.threshold, row["skip"], step - 1, row[SLOPE])

    def _curve(self, routing) -> list[float]:
        """The price of every skip ratio, by the router's own logits of the latest steps."""
        plan = routing.plan
        free = plan.real & (plan.position >= routing.config.forced_tokens)
        logits = torch.cat(gathered(plan.logits[free].detach().cpu()))      # of all processes
        self._recent = [*self._recent, logits][-RECENT:]
        return calibration_curve(torch.cat(self._recent))


class GlobalPenalty(Objective, name="global_penalty"):
    """`penalty` times the mean gate: one price for every layer and token, no target.

    Less `entropy_weight` times the entropy of the layers' keep rates, in nats, in their mean: the
    sequence-level studies' remedy against layers that are always run, or never.
    """

    class Weights(Settings):
        penalty: float = Field(1.0, ge=0.0)        # lambda of 'global_penalty' and of 'original'
        entropy_weight: float = Field(0.0, ge=0.0)

    def term(self, plan):
        cost = self.weights.penalty * plan.budget
        if self.weights.entropy_weight:
            entropy = binary_entropy(plan.gates[plan.real].mean(0)).mean()
            cost = cost - self.weights.entropy_weight * entropy
        return cost


class GlobalTarget(Objective, name="global_target"):
    """L1 from the batch's share of units that run to the target, as in SkipGPT (Zhao et al. 2025).

    The threshold is chosen after the training alone.
    """
    calibrates = True

    class Weights(Settings):
        distance: float = Field(5.0, ge=0.0)       # nats a unit of distance

    def term(self, plan):
        missed = self._shares(plan) - (1 - self.config.target_skip)
        return self.weights.distance * missed.abs().mean()

    def _shares(self, plan: Plan) -> torch.Tensor:
        """Shares of units that run, each of which is to meet the target."""
        return plan.budget


class TokenTarget(GlobalTarget, name="token_target"):
    """The same for each token by itself: D-LLM's budget (Jiang et al. 2024).

    Every token is held to the same depth, where a budget over a whole text leaves that free.
    """

    def _shares(self, plan):
        return plan.gates[plan.real].mean(-1)


class Original(Objective, name="original"):
    """The first studies' budget: L1 on each layer's keep rate, and a squared target term.

    It is here to show its failure: the L1 terms, summed over layers, swamp the target.
    """

    class Weights(GlobalPenalty.Weights):
        l1_weight: float = Field(5.0, ge=0.0)      # per-layer L1, summed over layers
        target_weight: float = Field(8.0, ge=0.0)  # squared distance to the target
        # factors of the first and the last routable layer's L1, linear between them
        l1_first: float = Field(1.0, ge=0.0)
        l1_last: float = Field(1.0, ge=0.0)

    def term(self, plan):
        weights = self.weights
        keep = plan.gates[plan.real].mean(0)
        missed = 1 - keep.mean() - self.config.target_skip
        factors = torch.linspace(weights.l1_first, weights.l1_last, len(keep), device=keep.device)
        cost = weights.l1_weight * (factors * keep).sum() + weights.target_weight * missed ** 2
        if weights.entropy_weight:
            cost = cost - weights.entropy_weight * binary_entropy(keep).mean()
        return weights.penalty * cost
