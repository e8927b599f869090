"""What the notebooks share: load a base once, train variants on it, and measure each beside its controls."""

import contextlib
import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import set_seed

from dlr.baselines import evaluate_static, greedy_static_order, order_of_mean_plan
from dlr.checkpoint import save_control, save_pretrained
from dlr.run_settings import RunConfig
from dlr.corpus import cache_folder
from dlr.data import load_documents, packed, padded_batches
from dlr.evaluate import calibrate_router, evaluate, paired_difference, summary
from dlr.weights import identity
from dlr.models import add_lora, load_base
from dlr.plan import static_pair
from dlr.policy import LayerDrop, MixedStaticPlan, Policy, RandomPlan, RouterPolicy, ShuffledPlan
from dlr.routed import Routing, attach
from dlr.runs import KINDS, write_atomically
from dlr.trainer import DLRTrainer
from dlr.warmstart import warm_start


@dataclass
class Bench:
    """A base model and its data, reused by every variant of a notebook."""
    config: RunConfig
    base: torch.nn.Module
    tokenizer: object
    calibration: list[dict]
    test: list[dict]
    data_hash: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)      # document tables by variant, for paired tests
    orders: dict[str, list[int]] = field(default_factory=dict)         # static orders by what they depend on
    open: "Variant | None" = None                                      # the variant whose LoRA and router are on the base

    def blocks(self, config: RunConfig):
        """Packed training blocks, enough for the steps and the warm start, in an order of the run's seed."""
        tokens = config.steps * config.batch_size * config.accumulation * config.seq_len
        tokens += config.warm_rounds * (config.warm_tokens + config.batch_size * config.seq_len)
        documents = load_documents(config.dataset, "train")
        return packed(documents, self.tokenizer, config.seq_len, config.seed, 2 * tokens)


def open_bench(config: RunConfig) -> Bench:
    """Loads model, tokenizer, calibration and test documents of `config`."""
    base, tokenizer = load_base(config.model, dtype=config.dtype, load_in_4bit=config.load_in_4bit,
                                attn_implementation=config.attn_implementation)
    if torch.cuda.is_available() and not config.load_in_4bit:
        base.to("cuda")
    documents = {split: load_documents(config.dataset, split) for split in ("train", "calibration", "test")}
    options = {"max_len": config.eval_len, "batch_size": 2 * config.batch_size}
    return Bench(config, base, tokenizer,
                 padded_batches(documents["calibration"], tokenizer, limit=config.calibration_docs, **options),
                 padded_batches(documents["test"], tokenizer, limit=config.eval_docs, **options),
                 "-".join(documents[split].hash for split in documents))


@dataclass
class Variant:
    """A trained model; close it before the next one is made on the same base."""
    name: str
    config: RunConfig
    model: torch.nn.Module
    routing: Routing
    notes: dict = field(default_factory=dict)
    bench: Bench | None = None

    def close(self) -> None:
        """Takes router and LoRA off the base again."""
        self.routing.detach()
        self.model.unload()
        if self.bench is not None and self.bench.open is self:
            self.bench.open = None


def _clear(bench: Bench) -> None:
    """Takes off the base what a cell that was stopped has left there."""
    if bench.open is not None:
        warnings.warn(f"The variant {bench.open.name!r} was still on the base model; it is taken off.", stacklevel=3)
        bench.open.close()


def _variant(bench: Bench, name: str, config: RunConfig) -> Variant:
    """Fresh LoRA and router on the bench's base."""
    _clear(bench)
    set_seed(config.seed)
    model = add_lora(bench.base, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout,
                     seed=config.seed)
    try:
        routing = attach(model, config.router())
    except BaseException:
        model.unload()
        raise
    bench.open = Variant(name, config, model, routing, bench=bench)
    return bench.open


def train(bench: Bench, name: str, config: RunConfig, folder: Path, policy: Policy | None = None) -> Variant:
    """Fresh LoRA and router on the bench's base, trained under `config`; `policy` fixes the plan of a control.

    Goes on from a checkpoint in `folder` where there is one. A trained router is calibrated and saved. With a warm start
    and `router_share=0` (the defaults) gradients train LoRA alone: the router is regressed on harm labels (see `warmstart`)
    and stays as it is. Where training stops with an error or an interrupt, the base model is given back as it was.
    """
    learns = policy is None
    order = best_static_order(bench, config) if learns and config.warm_start and config.warm_background == "static" else None
    folder.mkdir(parents=True, exist_ok=True)
    variant = _variant(bench, name, config)
    try:
        _fit(bench, variant, folder, policy, order)
    except BaseException:
        variant.close()
        raise
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    for labels in folder.glob("harm-*.safetensors"):
        labels.unlink()
    return variant


def _fit(bench: Bench, variant: Variant, folder: Path, policy: Policy | None, order: list[int] | None) -> None:
    """Warm start, training, calibration and checkpoint of a variant."""
    config, model, routing = variant.config, variant.model, variant.routing
    learns, blocks = policy is None, bench.blocks(config)
    if learns and config.warm_start:
        variant.notes |= warm_start(model, routing, blocks, config, folder, order)
    set_seed(config.seed)
    trainer = DLRTrainer(model, config, blocks, folder, policy)
    trainer.fit()
    if learns:
        if trainer.objective.calibrates:
            calibrate_router(model, routing, bench.calibration, config.target_skip, bf16=config.autocast)
        variant.notes["threshold"] = routing.config.threshold
        save_pretrained(model, folder / "checkpoint")


def measure(bench: Bench, variant: Variant, label: str, policy: Policy | None, kind: str = "routed",
            **notes) -> dict:
    """One row of the results table: `variant` evaluated on the test split under `policy`."""
    table = evaluate(variant.model, variant.routing, bench.test, policy, bf16=variant.config.autocast, describe=label)
    return row_of(bench, variant, label, table, kind, **notes)


def row_of(bench: Bench, variant: Variant, label: str, table: pd.DataFrame, kind: str, **notes) -> dict:
    """The row of a document table, which is kept for paired comparisons.

    Args:
        kind: what `label`, which is for readers, is a case of: one of KINDS. `of` in the row is the variant trained.
    """
    routing, config = variant.routing, variant.config
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    bench.tables[label] = table
    always = routing.first + routing.config.keep_last
    return {"variant": label, "kind": kind, "of": variant.name, "unit": routing.config.unit,
            "always_keep": routing.first, "seed": config.seed, "target_skip": config.target_skip, "steps": config.steps,
            **summary(table, always, routing.units_per_layer), **notes}


def base_row(bench: Bench) -> dict:
    """The untouched base model on the test split."""
    _clear(bench)
    routing = attach(bench.base, bench.config.router())
    try:
        variant = Variant("base", bench.config, bench.base, routing)
        return measure(bench, variant, "base", None, "base")
    finally:
        routing.detach()


def best_static_order(bench: Bench, config: RunConfig | None = None) -> list[int]:
    """Greedy order in which a static plan drops the base model's layers, searched on calibration documents alone.

    Found once and kept in the cache folder, under a key of all that it depends on: the base's weights and the numbers they
    are computed in, which layers may be dropped and how, and the very tokens read.
    """
    config = config or bench.config
    batches = _spread_documents(bench.calibration, config.static_docs)
    shape = config.router().model_dump(exclude={"threshold", "calibrated_skip", "curve", "base"})
    numbers = {"dtype": config.dtype, "load_in_4bit": config.load_in_4bit, "autocast": config.autocast}
    key = json.dumps([identity(bench.base), shape, numbers, _digest(batches)], sort_keys=True)
    path = cache_folder() / f"static-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if key not in bench.orders and path.is_file():
        bench.orders[key] = json.loads(path.read_text(encoding="utf-8"))
    if key not in bench.orders:
        _clear(bench)
        routing = attach(bench.base, config.router())
        try:
            bench.orders[key] = greedy_static_order(bench.base, routing, batches, bf16=config.autocast)
        finally:
            routing.detach()
        write_atomically(path, json.dumps(bench.orders[key]))
    return bench.orders[key]


def _digest(batches: list[dict]) -> str:
    """Of the documents in `batches`, whatever batches they came in."""
    documents = [ids[real.bool()].tolist() for batch in batches
                 for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


def _spread_documents(batches: list[dict], count: int) -> list[dict]:
    """The batches cut down to `count` documents, spread evenly over them (they are sorted by length)."""
    rows = torch.linspace(0, sum(len(b["row"]) for b in batches) - 1, count).round().long().unique()
    found, start = [], 0
    for batch in batches:
        mine = rows[(rows >= start) & (rows < start + len(batch["row"]))] - start
        if len(mine):
            found.append({name: tensor[mine] for name, tensor in batch.items()})
        start += len(batch["row"])
    return found


def forced_share(bench: Bench, keep_first_tokens: int) -> float:
    """Share of the test split's tokens that run every layer because they open a document."""
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in bench.test])
    return float(lengths.clamp(max=keep_first_tokens).sum() / lengths.sum())


def routed_rows(bench: Bench, variant: Variant) -> list[dict]:
    """A routed model's own row and, on the same weights, the plans it must beat: shuffled, mean, random.

    `against_router` of a control is its loss less the router's: positive where the router wins.
    """
    routing, name = variant.routing, variant.name
    rows = [measure(bench, variant, name, RouterPolicy(), "routed", **variant.notes)]
    measured, keep = rows[0]["skip"], rows[0]["keep_rate"]
    forced = forced_share(bench, routing.config.keep_first_tokens)
    rows.append(measure(bench, variant, f"{name}, shuffled", ShuffledPlan(variant.config.seed), "shuffled"))
    table = evaluate_static(variant.model, routing, bench.test, order_of_mean_plan(keep), measured, forced,
                            bf16=variant.config.autocast)
    rows.append(row_of(bench, variant, f"{name}, mean plan", table, "mean"))
    rows.append(measure(bench, variant, f"{name}, random plan",
                        RandomPlan(measured / (1 - forced), variant.config.seed), "random"))
    for row in rows[1:]:
        row |= {"against_router": paired_difference(bench.tables[row["variant"]], bench.tables[name])}
    return rows


def static_row(bench: Bench, config: RunConfig, folder: Path, skip: float, order: list[int] | None = None,
               name: str = "best static") -> dict:
    """The static plan along `order` (the greedy one by default) at `skip`, healed by the same LoRA budget."""
    order = order or best_static_order(bench, config)
    forced = forced_share(bench, config.keep_first_tokens)
    plan = MixedStaticPlan(*static_pair(order, len(order), skip, forced))
    with _trained(bench, name, config, folder, plan) as variant:
        save_control(variant.model, variant.routing, folder / "checkpoint", "static", order, skip, forced)
        table = evaluate_static(variant.model, variant.routing, bench.test, order, skip, forced, bf16=config.autocast)
        return row_of(bench, variant, name, table, "static", order=order)


@contextlib.contextmanager
def _trained(bench: Bench, name: str, config: RunConfig, folder: Path, policy: Policy):
    """A control trained under `policy`; its LoRA is taken off again when the block ends."""
    variant = train(bench, name, config, folder, policy)
    try:
        yield variant
    finally:
        variant.close()


def dense_row(bench: Bench, config: RunConfig, folder: Path) -> dict:
    """LoRA at full depth with the same steps and data."""
    with _trained(bench, "dense LoRA", config, folder, LayerDrop(0.0)) as variant:
        save_control(variant.model, variant.routing, folder / "checkpoint", "dense")
        return measure(bench, variant, "dense LoRA", None, "dense")


def stochastic_rows(bench: Bench, config: RunConfig, folder: Path, skips: list[float]) -> list[dict]:
    """LoRA under stochastic depth, evaluated at full depth and with each of `skips` dropped at random.

    Raises:
        ValueError: `config.layer_drop` is 0, so that no depth is stochastic.
    """
    if config.layer_drop == 0:
        raise ValueError("Stochastic depth drops layers in training: give layer_drop above 0 (0.5, say).")
    with _trained(bench, "stochastic depth", config, folder, LayerDrop(config.layer_drop)) as variant:
        save_control(variant.model, variant.routing, folder / "checkpoint", "stochastic",
                     skip=config.layer_drop)
        rows = [measure(bench, variant, "stochastic depth, full", None, "stochastic")]
        forced = forced_share(bench, config.keep_first_tokens)
        return rows + [measure(bench, variant, f"stochastic depth, {skip:.0%} dropped",
                               RandomPlan(skip / (1 - forced), config.seed), "stochastic") for skip in skips]


def against_static(bench: Bench, routed: str) -> dict | None:
    """Loss of the routed model less that of the best static plan, in nats a token, paired (negative: the router wins).

    None where either was not among the variants.
    """
    if "best static" not in bench.tables or routed not in bench.tables:
        return None
    return paired_difference(bench.tables[routed], bench.tables["best static"])

