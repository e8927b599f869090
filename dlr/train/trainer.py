"""Training on transformers.Trainer: one step's loss, log and objective, and exact resumption."""

import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainingArguments

from dlr.base.checkpoint import refuse_unsaveable, write_router
from dlr.measure.likelihood import predicted
from dlr.processes import begin, count, gathered
from dlr.routing.decoder import routing_of
from dlr.routing.elastic import ElasticRouter
from dlr.routing.plan import gate_entropy
from dlr.routing.policy import Policy, RouterPolicy
from dlr.routing.router import ROUTER_NAME
from dlr.train.fitting import train_as_fits
from dlr.train.losses import losses
from dlr.train.objectives import OBJECTIVES, SLOPE, Objective
from dlr.train.resume import finished, load_router, load_state, newest, steps_of
from dlr.train.settings import RunConfig
from dlr.train.several import average_gradients, begin_alike, shard, share_of_batch
from dlr.train.steps import StepEnd, write_log
from dlr.train.stopping import Stopped, heeding
from dlr.train.validation import Patience, ValidatingTrainer, Validation

# Share of the router's steps in which noise fades. A plan is noise-free where it is used, and a
# model that met random plans alone is worse under that one than under random ones.
NOISELESS_FROM = 0.75
# As transformers names them: its 'constant' has no warm-up.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stacks packed blocks or pads unequal rows on the right.

    Labels are -100 at padding and at each row's first token: Trainer counts predicted positions.
    """
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row["input_ids"])] = row["input_ids"]
        mask[i, :len(row["input_ids"])] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class DLRTrainer(ValidatingTrainer):
    """Trains LoRA of a routed PEFT model and, for as many steps as its objective says, the router.

    Several processes, started by a launcher, train one model together; `batch_size` is the whole
    batch of all of them.

    Args:
        policy: None trains the router's own plan. Under a fixed one (static, stochastic depth,
            dense) LoRA alone is trained.
        validation: batches to validate on every `eval_steps` steps; None: none are.

    Raises:
        ValueError: the processes cannot share `batch_size` equally.
    """
    # compute_loss divides by the number of labels in the whole accumulated batch, so Trainer must
    # not divide again: batch 1 x 4 accumulated then equals batch 4 x 1.
    loss_is_scaled_for_ga = True

    def __init__(self, model, config: RunConfig, dataset, folder: Path,
                 policy: Policy | None = None, validation: list[dict] | None = None):
        self.config = config
        self.routing = routing_of(model)
        self.folder = Path(folder)
        self.routing.bf16 = config.autocast            # measured in what it is trained in
        refuse_unsaveable(model, self.routing)         # before a training that could not be kept
        self.learns_routing = policy is None
        own = ElasticRouter if config.elastic else RouterPolicy
        self.policy = policy or own(training=True, noise=config.gumbel_noise)
        objective = OBJECTIVES[config.objective] if self.learns_routing else Objective
        self._objective_class, self.is_stopping, self._asked_to_stop = objective, False, False
        if validation and config.eval_steps:
            self.validation = Validation(validation, policy, config, self.routing)
        begin()
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"), max_steps=config.steps, seed=config.seed,
            gradient_accumulation_steps=config.accumulation, learning_rate=config.lr,
            warmup_steps=round(config.warmup * config.steps),
            lr_scheduler_type=SCHEDULES[config.schedule], bf16=config.autocast,
            save_steps=config.save_steps, save_total_limit=1, logging_strategy="no",
            disable_tqdm=True, report_to=[],
            use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
            activation_checkpointing=config.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            fsdp=True if config.shard and count() > 1 else None,
            **self.validation_arguments(config) if self.validation else {})
        arguments.per_device_train_batch_size = share_of_batch(config.batch_size, count())
        arguments._n_gpu = min(arguments.n_gpu, 1)     # one process takes one GPU, whatever it sees
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        super().__init__(model, arguments, train_dataset=dataset, data_collator=collate,
                         eval_dataset=validation)
        self.model_accepts_loss_kwargs = True          # Trainer then counts all accumulated labels
        self.remove_callback(PrinterCallback)          # log.csv and the progress bar say more
        self.add_callback(StepEnd(self))
        if self.validation and config.patience:
            self.add_callback(Patience(config.patience))
        self._begin()

    def _begin(self) -> None:
        """What is counted from the first step of a try on, or from the one it goes on with."""
        self.objective = self._objective_class(self.config)
        self._sums: dict[str, float] = {}
        self._clock = time.perf_counter()

    # -- one step ----------------------------------------------------------------------------------
    def training_step(self, *args, **options):
        loss = super().training_step(*args, **options)
        if self.is_fsdp_enabled:
            average_gradients(self.routing.router)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        config, routing = self.config, self.routing
        real = inputs["attention_mask"].bool()
        count = predicted(real).sum()
        share = 1.0                            # of the labels in the whole accumulated batch
        if num_items_in_batch is not None:
            share = count * self.accelerator.num_processes / num_items_in_batch
        begun = self.state.global_step >= round(config.kd_warmup * config.steps)
        weight = config.kd_weight if begun else 0.0
        with routing.autocast():         # the head's passes too, and all where the base is sharded
            ce, kd = losses(self.accelerator.unwrap_model(model), routing, inputs,
                            self._policy_now(), config.kd_temperature if weight else None,
                            run=model)
        ce = ce.mean()
        kd = ce * 0 if kd is None else kd.mean()
        budget = self.objective.term(routing.plan)
        loss = (1 - weight) * ce + weight * kd + budget
        self._record(ce=ce, kd=kd, budget=budget, tokens=real.sum(), count=count)
        return (loss * share, None) if return_outputs else loss * share

    def _policy_now(self) -> Policy | None:
        step = self.state.global_step
        if self.learns_routing:
            start, end = self.config.gumbel_start, self.config.gumbel_end
            progress = min(1.0, step / max(1, self.config.steps - 1))
            self.policy.temperature = start + (end - start) * progress
            self.policy.training = step < self.objective.router_steps
            learnt = step / max(1, self.objective.router_steps)
            self.policy.noise = self.config.gumbel_noise * max(0.0, 1 - learnt / NOISELESS_FROM)
        return self.policy

    def _record(self, tokens, count, **terms) -> None:
        """Sums over the accumulated batch: losses by predicted tokens, the plan by real ones."""
        plan = self.routing.plan
        tokens, count = float(tokens), float(count)
        values = {name: (count, float(value.detach())) for name, value in terms.items()}
        values["skip"] = tokens, plan.skip_ratio
        if plan.logits is not None:
            logits = plan.logits[plan.real].detach()
            open_share = torch.sigmoid(logits - self.routing.calibration.threshold)
            values["gate_entropy"] = tokens, gate_entropy(open_share)
            values[SLOPE] = tokens, self._slope(logits)
        for unit, keep in enumerate(plan.keep_rate.tolist()):
            values[f"keep_{unit}"] = tokens, keep
        for name, (weight, value) in values.items():
            for key, amount in ((name, weight * value), (f"{name} weight", weight)):
                self._sums[key] = self._sums.get(key, 0.0) + amount
        self._sums["tokens"] = self._sums.get("tokens", 0.0) + tokens

    def _slope(self, logits: torch.Tensor) -> float:
        """How fast the skip ratio rises with the threshold: the density of noisy logits there.

        Where noise has faded, a tenth of it stands in. All processes take the same scale.
        """
        scale = max(getattr(self.policy, "noise", 1.0), 0.1)
        share = torch.sigmoid((logits - self.routing.calibration.threshold) / scale)
        return float((share * (1 - share)).mean()) / scale

    def _means(self) -> tuple[dict[str, float], float]:
        """Means over the step's tokens on all processes, and their number; the sums begin anew."""
        sums, self._sums = self._sums | {"stops": float(self._asked_to_stop)}, {}
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        if self.accelerator.num_processes > 1:   # every process must move the one threshold alike
            totals = self.accelerator.reduce(totals.to(self.accelerator.device), "sum").cpu()
        totals = dict(zip(sums, totals.tolist()))
        means = {name: totals[name] / totals[f"{name} weight"] for name in sums
                 if f"{name} weight" in sums}
        self.is_stopping = totals["stops"] > 0       # of all processes, at the same step
        return means, totals["tokens"]

    def step_done(self, step: int) -> dict:
        """Tells the objective that `step` (1 = first) is done, and logs it; returns its row.

        The row holds means over the step's tokens of all accumulated batches and processes.
        """
        row, tokens = self._means()
        now = time.perf_counter()
        is_sampled = getattr(self.policy, "training", False)       # else no gate has a temperature
        row |= {"step": step, "goal": self.objective.controller.goal(step - 1),
                "threshold": self.routing.calibration.threshold,
                "temperature": self.policy.temperature if is_sampled else None,
                "lr": self.lr_scheduler.get_last_lr()[0],
                "tokens_per_second": tokens / (now - self._clock),
               "rows": self.args.per_device_train_batch_size}
        self._clock = now
        self.objective.after_step(self.routing, step, row)
        self.log(row)
        self.write_log()
        return row

    def write_log(self) -> None:
        """Writes log.csv as it is now."""
        if self.args.should_save:
            write_log(self.state.log_history, self.folder / "log.csv")

    # -- optimizer, checkpoints --------------------------------------------------------------------
    def create_optimizer(self, model=None):
        """AdamW with one learning rate for LoRA and skip adapters and one for the router."""
        lora, router = [], []
        for name, parameter in (model or self.model).named_parameters():
            decides = ROUTER_NAME in name and f"{ROUTER_NAME}.skip." not in name
            if ROUTER_NAME in name:
                parameter.requires_grad_(self.learns_routing or not decides)
            if parameter.requires_grad:
                (router if decides else lora).append(parameter)
        groups = [{"params": parameters, "lr": rate} for parameters, rate in
                  ((lora, self.config.lr), (router, self.config.router_lr)) if parameters]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, self.config.adam_beta2),
                                           weight_decay=self.config.weight_decay)
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            base = self.routing.base if self.is_fsdp_enabled else None    # sharded: not read again
            write_router(self.routing, folder, self.accelerator.unwrap_model(self.model), base)
            (folder / "training_args.bin").unlink(missing_ok=True)                     # a pickle

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_router(self.routing, Path(resume_from_checkpoint))

    def fit(self) -> int:
        """Trains, from the newest complete checkpoint in the run's folder where there is one.

        A training that is finished is taken as it is, however many processes it had.

        Returns:
            The steps done: `config.steps`, or fewer where patience was at an end.

        Raises:
            ValueError: that checkpoint was written by another number of processes; or `shard` is
                set and there is one process; or the launcher shards and `shard` is not set; or
                memory does not hold one sequence.
            Stopped: the process was asked to end; the step that was in progress is saved.
        """
        output = Path(self.args.output_dir)
        end = finished(output, self.args.max_steps)       # Trainer itself would take one step more
        if end is not None:
            load_state(self.model, self.routing, end)
        else:
            self._refuse_sharding()
            begin_alike(self.routing)
            if self.is_fsdp_enabled:
                shard(self.accelerator, self.routing)
            with heeding(self._stop):
                train_as_fits(self, self.routing, self._newest, self._begin)
            # asked after the last step too: nothing is begun after it
            if any(gathered(self.is_stopping or self._asked_to_stop)):
                raise Stopped(f"step {self.state.global_step} of {self.args.max_steps} is saved; "
                              "the same command goes on from there")
        self.routing.policy = RouterPolicy()
        self.model.eval()
        return steps_of(end) if end is not None else self.state.global_step

    def _newest(self) -> Path | None:
        with self.accelerator.main_process_first():      # one process tidies up, others wait
            return newest(Path(self.args.output_dir), count())

    def _stop(self) -> None:
        self._asked_to_stop = True

    def _refuse_sharding(self) -> None:
        if self.config.shard and count() == 1:
            raise ValueError("shard=true spreads the base over several processes, and this is one: "
                             "torchrun --nproc-per-node N -m dlr train ..., or leave shard out.")
        if self.is_fsdp_enabled and not self.config.shard:
            raise ValueError("The launcher's own configuration asks for FSDP, and this run does "
                             "not: add --set shard=true, or take FSDP out of that configuration.")
