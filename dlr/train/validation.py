"""Held-out loss while a model is trained, and the state of the training that had the least.

The text is of the validation split, which nothing else reads: no training, no labels, no
calibration, no test. It is measured as results are, with the same account of what was skipped.
"""

import contextlib
import time
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import EarlyStoppingCallback, Trainer

from dlr.base.data import padded_batches
from dlr.base.lines import documents_of
from dlr.measure.evaluate import evaluate, mean_nll, skip_ratio
from dlr.measure.static import forced_share
from dlr.processes import agreed, dealt
from dlr.routing.budget import DIAL, threshold_at
from dlr.routing.device import device_of
from dlr.routing.elastic import ElasticStatic
from dlr.routing.handle import Routing
from dlr.routing.plan import static_pair
from dlr.routing.policy import MixedStaticPlan, Policy, RouterPolicy, StaticPlan
from dlr.train.resume import BEST, STATE
from dlr.train.settings import RunConfig


def validation_batches(config: RunConfig, tokenizer) -> list[dict] | None:
    """Documents to validate on, cut as where results are measured; None: `eval_steps` is 0.

    Raises:
        ValueError: the validation split has none.
    """
    if not config.eval_steps:
        return None
    try:
        documents = documents_of(config, "validation")
    except ValueError as error:
        raise ValueError(f"{error} Or set eval_steps=0: training is not validated then.") from None
    return padded_batches(documents, tokenizer, config.eval_len, config.batch_size,
                          config.validation_docs)


class Validation:
    """Measures a model in training, which is not disturbed: random numbers are put back.

    Args:
        batches: of `validation_batches`.
        policy: that LoRA is trained under; None: the router's own, whose plan without noise at the
            present threshold is measured. What draws at random draws alike each time. An elastic
            training is measured at `target_skip`.
    """

    def __init__(self, batches: list[dict], policy: Policy | None, config: RunConfig,
                 routing: Routing):
        self.batches, self.config, self.routing = batches, config, routing
        self.is_dialled = config.elastic and policy is None
        if isinstance(policy, ElasticStatic):
            forced = forced_share(batches, config.keep_first_tokens)
            policy = MixedStaticPlan(*static_pair(policy.order, routing.units,
                                                  min(config.target_skip, 1 - forced), forced))
        self.parts = [(1.0, policy or RouterPolicy())]         # (share of the documents, policy)
        if isinstance(policy, MixedStaticPlan):                # exactly, without draws
            shares = 1 - policy.share_more, policy.share_more
            self.parts = [(share, StaticPlan(plan)) for share, plan in zip(shares, policy.plans)
                          if share]

    def __call__(self, model, together: bool) -> dict[str, float]:
        """val_ce, nats a token, and val_skip.

        Args:
            together: of several processes, whether each runs every document: a sharded model needs
                all of them in each layer. Else they share the documents.
        """
        device, is_training = device_of(model), model.training

        def table(numbered: tuple[int, dict]) -> pd.DataFrame:
            number, batch = numbered
            torch.manual_seed(self.config.seed + number)
            return sum(share * evaluate(model, self.routing, [batch], policy, bar=False)
                       for share, policy in self.parts)

        numbered = list(enumerate(self.batches))
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), self._at_target():
            tables = pd.concat(map(table, numbered) if together else dealt(numbered, table))
        model.train(is_training)
        return {"val_ce": mean_nll(tables), "val_skip": skip_ratio(tables)}

    def _at_target(self):
        if not self.is_dialled:
            return contextlib.nullcontext()
        skip = min(self.config.target_skip, DIAL[-1])
        return self.routing.at(threshold=threshold_at(self.routing.calibration.curve, skip))


class Patience(EarlyStoppingCallback):
    """Trainer's own, without its warning that the best state is not loaded: it is kept apart."""

    def on_train_begin(self, args, state, control, **kwargs):
        pass


class ValidatingTrainer(Trainer):
    """A Trainer that validates by a `Validation` and keeps the state with the least `val_ce`.

    That is one of the steps at which the budget is held: the loss of a router falls wherever it
    skips less.
    """
    validation: Validation | None = None

    @staticmethod
    def validation_arguments(config: RunConfig) -> dict:
        """Arguments of a training that is validated."""
        return {"eval_strategy": "steps", "eval_steps": config.eval_steps,
                "metric_for_best_model": "val_ce", "greater_is_better": False,
                "restore_callback_states_from_checkpoint": config.patience > 0}

    def holds_budget(self) -> bool:
        """Whether the skip is what it is to be, so that losses of steps can be compared."""
        objective = self.objective
        reached = self.state.global_step >= objective.controller.ramp_steps
        return not self.learns_routing or objective.calibrates and reached

    def evaluate(self, *args, **options) -> dict[str, float]:
        """Measures, and writes `val_ce` and `val_skip` into the log's newest row.

        Raises:
            ValueError: a pass without gradients does not fit in memory.
        """
        try:
            row = self.validation(self.accelerator.unwrap_model(self.model), self.is_fsdp_enabled)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise ValueError("Validation does not fit in memory: set a smaller eval_len, or "
                             "eval_steps=0.") from error
        row = agreed(row)                # rounding may differ, and all must decide alike
        self.state.log_history[-1] |= row
        self.write_log()
        metrics = {f"eval_{name}": value for name, value in row.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control,
                                                         metrics)
        self.control.should_save |= self.control.should_training_stop
        self._clock = time.perf_counter()
        return metrics

    def _determine_best_metric(self, metrics, trial):
        is_best = self.holds_budget() and super()._determine_best_metric(metrics, trial)
        self.state.best_global_step = None      # Trainer would keep that checkpoint, not the last
        if is_best:
            folder = Path(self.args.output_dir) / BEST
            if self.args.should_save:               # written last: a kill leaves none, not a half
                (folder / STATE).unlink(missing_ok=True)
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                self.state.save_to_json(str(folder / STATE))
        return is_best
