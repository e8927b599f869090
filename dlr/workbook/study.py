"""What notebooks share: one loaded base, variants trained on it, each measured with controls."""

import warnings
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import set_seed

from dlr.base.checkpoint import save_pretrained
from dlr.base.data import packed, padded_batches
from dlr.base.lines import documents_of
from dlr.base.models import add_lora, load_base
from dlr.measure import static
from dlr.measure.evaluate import calibrate_router, evaluate, paired_difference, summary
from dlr.measure.flops import added_weights
from dlr.measure.static import evaluate_static, order_of_mean_plan
from dlr.processes import agreed
from dlr.routing.attach import attach
from dlr.routing.handle import Routing
from dlr.routing.policy import LayerDrop, Policy, RandomPlan, RouterPolicy, ShuffledPlan
from dlr.runs import KINDS
from dlr.train.controls import meets_target, static_policy, stochastic_policy
from dlr.train.kept import keep_control, kept_states
from dlr.train.prepare import Preparation, context_batches, prepare
from dlr.train.regress import start
from dlr.train.resume import finished, keep_notes, read_notes
from dlr.train.settings import RunConfig
from dlr.train.trainer import DLRTrainer
from dlr.train.validation import validation_batches


@dataclass
class Bench:
    """A base model and its data, reused by every variant of a notebook."""
    config: RunConfig
    base: torch.nn.Module
    tokenizer: object
    calibration: list[dict]
    test: list[dict]
    # one row a document, by variant, kept for paired tests
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    # the variant whose LoRA and router are on the base
    open: "Variant | None" = None

    def blocks(self, config: RunConfig):
        """Packed training blocks for the steps, in an order drawn by the run's seed."""
        tokens = config.steps * config.batch_size * config.accumulation * config.seq_len
        documents = documents_of(config, "train")
        return packed(documents, self.tokenizer, config.seq_len, config.seed, 2 * tokens)

    def preparation(self, config: RunConfig, labels: bool) -> Preparation:
        """The base's skip adapters, static order and (where asked for) labels under `config`."""
        _clear(self)
        return prepare(self.base, self.tokenizer, config, labels)


def open_bench(config: RunConfig) -> Bench:
    """Loads model, tokenizer, calibration and test documents of `config`."""
    base, tokenizer = load_base(config.model, **config.loading_base)
    if torch.cuda.is_available() and not config.load_in_4bit:
        base.to("cuda")

    def batches(split: str, limit: int) -> list[dict]:
        documents = documents_of(config, split)
        return padded_batches(documents, tokenizer, config.eval_len, 2 * config.batch_size, limit)
    return Bench(config, base, tokenizer, batches("calibration", config.calibration_docs),
                 batches("test", config.eval_docs))


@dataclass
class Variant:
    """A trained model. It must be closed before the next one is made on the same base."""
    name: str
    config: RunConfig
    model: torch.nn.Module
    routing: Routing
    notes: dict = field(default_factory=dict)
    bench: Bench | None = None
    steps: int | None = None            # that were trained; None: as `config` says

    def close(self) -> None:
        """Takes router and LoRA off the base again."""
        self.routing.detach()
        self.model.unload()
        if self.bench is not None and self.bench.open is self:
            self.bench.open = None


def _clear(bench: Bench) -> None:
    """Takes the router and LoRA of an interrupted notebook cell off the base."""
    if bench.open is not None:
        warnings.warn(f"The variant {bench.open.name!r} was still on the base model; it is taken "
                      "off.", stacklevel=3)
        bench.open.close()


def fresh_variant(bench: Bench, name: str, config: RunConfig,
                  preparation: Preparation | None = None) -> Variant:
    """Fresh LoRA and router on the bench's base, this with a preparation's adapters and book."""
    _clear(bench)
    set_seed(config.seed)
    model = add_lora(bench.base, rank=config.lora_rank, alpha=config.lora_alpha,
                     dropout=config.lora_dropout, seed=config.seed,
                     first=0 if config.lora_prefix else config.always_keep,
                     targets=config.lora_targets)
    try:
        routing = attach(model, config.router(), bf16=config.autocast)
    except BaseException:
        model.unload()
        raise
    if preparation is not None:
        preparation.install(routing)
    bench.open = Variant(name, config, model, routing, bench=bench)
    return bench.open


def train(bench: Bench, name: str, config: RunConfig, folder: Path,
          policy: Policy | None = None, keep: bool = True) -> Variant:
    """Trains fresh LoRA and router on the bench's base under `config`, a control under `policy`.

    Training resumes from a checkpoint in `folder`, which stays until the run is finished, so that
    an interrupt costs none of its variants. A trained router is calibrated and saved. With a warm
    start and `router_share=0` (the defaults) gradients train LoRA and skip adapters alone: the
    router is regressed on harm labels (see `regress`) and stays as it is. After an error or an
    interrupt the base model is as it was before. Without `keep` calibration and saving are left to
    another call. The last state is what the variant has and what `checkpoint` holds; `best` beside
    it holds that of least held-out loss, where that was an earlier one.
    """
    done = agreed(finished(folder / "trainer", config.steps) is not None)
    warm = policy is None and config.warm_start
    held_out = None if done else validation_batches(config, bench.tokenizer)    # refused at once
    preparation = None
    if config.is_prepared:
        preparation = bench.preparation(config, labels=warm and not done)
    folder.mkdir(parents=True, exist_ok=True)
    variant = fresh_variant(bench, name, config, preparation)
    try:
        if done:
            variant.notes |= read_notes(folder / "trainer")
        elif warm:
            context = context_batches(bench.tokenizer, config)
            variant.notes |= start(variant.model, variant.routing, preparation.labels,
                                   bench.calibration, config, context)
        keep_notes(folder / "trainer", variant.notes)
        _fit(bench, variant, folder, policy, keep, held_out)
    except BaseException:
        variant.close()
        raise
    return variant


def _fit(bench: Bench, variant: Variant, folder: Path, policy: Policy | None, keep: bool,
         held_out: list[dict] | None) -> None:
    """Training, calibration and checkpoint of a variant."""
    config, model, routing = variant.config, variant.model, variant.routing
    set_seed(config.seed)
    trainer = DLRTrainer(model, config, bench.blocks(config), folder, policy, held_out)
    variant.steps = trainer.fit()
    if policy is None and keep:
        for name in kept_states(model, routing, folder, config.steps):
            if trainer.objective.calibrates:
                calibrate_router(model, routing, bench.calibration, config.target_skip)
            save_pretrained(model, folder / name)
        variant.notes["threshold"] = routing.calibration.threshold


def measure(bench: Bench, variant: Variant, label: str, policy: Policy | None,
            kind: str = "routed", **notes) -> dict:
    """One row of the results table: `variant` evaluated on the test split under `policy`."""
    table = evaluate(variant.model, variant.routing, bench.test, policy, describe=label)
    return row_of(bench, variant, label, table, kind, **notes)


def row_of(bench: Bench, variant: Variant, label: str, table: pd.DataFrame, kind: str,
           **notes) -> dict:
    """The results row of a document table, which is kept for paired comparisons.

    Args:
        label: the row's name, for readers.
        kind: one of KINDS, for programs. The row's `of` names the trained variant.
    """
    routing, config = variant.routing, variant.config
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    bench.tables[label] = table
    always = routing.first + routing.config.keep_last
    if kind == "routed" and not routing.router.causal:
        notes["causal"] = False          # its gates have seen the tokens that it is to predict
    return {"variant": label, "kind": kind, "of": variant.name, "unit": routing.config.unit,
            "always_keep": routing.first, "seed": config.seed, "target_skip": config.target_skip,
            "steps": variant.steps or config.steps,
            "attention": bench.base.config._attn_implementation,
            **summary(table, always, routing.units_per_layer),
            **added_weights(routing.router, kind), **notes}


def base_row(bench: Bench) -> dict:
    """The untouched base model on the test split."""
    _clear(bench)
    routing = attach(bench.base, bench.config.router(), bf16=bench.config.autocast)
    try:
        variant = Variant("base", bench.config, bench.base, routing)
        return measure(bench, variant, "base", None, "base")
    finally:
        routing.detach()


def best_static_order(bench: Bench, config: RunConfig | None = None) -> list[int]:
    """The base's greedy static order, under `config` or the bench's own settings."""
    return bench.preparation(config or bench.config, labels=False).order


def forced_share(bench: Bench, keep_first_tokens: int) -> float:
    """Share of the test split's tokens that run every layer because they open a document."""
    return static.forced_share(bench.test, keep_first_tokens)


def routed_rows(bench: Bench, variant: Variant, name: str = "", **notes) -> list[dict]:
    """A routed model's row and, on its weights, the plans it must beat: shuffled, mean, random.

    `against_router` of a control is its loss less the router's: positive where the router wins.
    The router's row is called `name`, by default as the variant is.
    """
    routing, name, seed = variant.routing, name or variant.name, variant.config.seed
    routed = measure(bench, variant, name, RouterPolicy(), "routed", **variant.notes | notes)
    skip = routed["skip"]
    order = order_of_mean_plan(routed["keep_rate"])
    forced = forced_share(bench, routing.config.keep_first_tokens)
    controls = []
    if routing.router.ahead:         # a plan that is not known ahead cannot be shuffled
        controls += [measure(bench, variant, f"{name}, shuffled", ShuffledPlan(seed), "shuffled",
                             **notes)]
    table = evaluate_static(variant.model, routing, bench.test, order, skip, forced)
    controls += [row_of(bench, variant, f"{name}, mean plan", table, "mean", **notes),
                 measure(bench, variant, f"{name}, random plan",
                         RandomPlan(skip / (1 - forced), seed), "random", **notes)]
    for row in controls:
        row["against_router"] = paired_difference(bench.tables[row["variant"]], bench.tables[name])
    return [routed, *controls]


def static_row(bench: Bench, config: RunConfig, folder: Path, skip: float,
               order: list[int] | None = None, name: str = "best static") -> dict:
    """The static plan along `order`, by default the greedy one, healed by the same LoRA budget.

    It is measured at `skip`. It is healed there too, where a router's skip is known only once it is
    measured; where the objective calibrates it, at the target.
    """
    order = order or best_static_order(bench, config)
    forced = forced_share(bench, config.keep_first_tokens)
    healed = config.target_skip if meets_target(config) else skip
    with closing(train_static(bench, name, config, folder, order, healed)) as variant:
        table = evaluate_static(variant.model, variant.routing, bench.test, order, skip, forced)
        return row_of(bench, variant, name, table, "static", order=order)


def train_static(bench: Bench, name: str, config: RunConfig, folder: Path, order: list[int],
                 skip: float) -> Variant:
    """LoRA and skip adapters healed under static plans along `order`; saved.

    The plans skip `skip`, or, where `config` is elastic, what each sequence draws.
    """
    forced = forced_share(bench, config.keep_first_tokens)
    variant = train(bench, name, config, folder, static_policy(config, order, skip, forced))
    keep_control(variant.model, variant.routing, folder, config.steps, "static", order, skip,
                 forced)
    return variant


def dense_row(bench: Bench, config: RunConfig, folder: Path) -> dict:
    """LoRA at full depth with the same steps and data."""
    with closing(train(bench, "dense LoRA", config, folder, LayerDrop(0.0))) as variant:
        keep_control(variant.model, variant.routing, folder, config.steps, "dense")
        return measure(bench, variant, "dense LoRA", None, "dense")


def stochastic_rows(bench: Bench, config: RunConfig, folder: Path,
                    skips: list[float]) -> list[dict]:
    """LoRA under stochastic depth, or under random token plans where `config.drop_level` says so.

    Both are evaluated at full depth and with `skips` dropped at random.

    Raises:
        ValueError: `config.layer_drop` is 0, so that no depth is stochastic.
    """
    policy = stochastic_policy(config)
    of = "random token plans" if config.drop_level == "token" else "stochastic depth"
    with closing(train(bench, of, config, folder, policy)) as variant:
        keep_control(variant.model, variant.routing, folder, config.steps, "stochastic", None,
                     config.layer_drop)
        rows = [measure(bench, variant, f"{of}, full", None, "stochastic")]
        forced = forced_share(bench, config.keep_first_tokens)
        for skip in skips:
            plan = RandomPlan(skip / (1 - forced), config.seed)
            name = f"{of}, {skip:.0%} dropped"
            rows.append(measure(bench, variant, name, plan, "stochastic"))
        return rows
