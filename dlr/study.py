"""What the notebooks share: load a base once, train variants on it, and measure each beside its controls."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from dlr.baselines import evaluate_static, greedy_static_order, order_of_mean_plan, static_pair
from dlr.checkpoint import save_pretrained
from dlr.config import RunConfig
from dlr.corpus import cache_folder
from dlr.data import load_documents, packed, padded_batches
from dlr.evaluate import calibrate_router, evaluate, paired_difference, summary
from dlr.identity import identity
from dlr.models import add_lora, load_base
from dlr.policy import LayerDrop, MixedStaticPlan, Policy, RandomPlan, RouterPolicy, ShuffledPlan
from dlr.routed import Routing, attach
from dlr.runs import write_atomically
from dlr.trainer import DLRTrainer, seed_everything
from dlr.variants import save_control
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
    order: list[int] | None = None

    def blocks(self, config: RunConfig):
        """Packed training blocks, enough for the steps and the warm start, in an order of the run's seed."""
        tokens = config.steps * config.batch_size * config.accumulation * config.seq_len
        tokens += config.warm_rounds * (config.warm_tokens + config.batch_size * config.seq_len)
        documents = load_documents(config.dataset, "train")
        return packed(documents, self.tokenizer, config.seq_len, config.seed, 2 * tokens)


def open_bench(config: RunConfig) -> Bench:
    """Loads model, tokenizer, calibration and test documents of `config`."""
    base, tokenizer = load_base(config)
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

    def close(self) -> None:
        """Takes router and LoRA off the base again."""
        self.routing.detach()
        self.model.unload()


def train(bench: Bench, name: str, config: RunConfig, folder: Path, policy: Policy | None = None) -> Variant:
    """Fresh LoRA and router on the bench's base, trained under `config`; `policy` fixes the plan of a control.

    Goes on from a checkpoint in `folder` where there is one. A trained router is calibrated and saved.
    """
    learns = policy is None
    order = best_static_order(bench) if learns and config.warm_start and config.warm_background == "static" else None
    seed_everything(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = add_lora(bench.base, config)
    routing = attach(model, config.router())
    variant = Variant(name, config, model, routing)
    blocks = bench.blocks(config)
    if learns and config.warm_start:
        variant.notes |= warm_start(model, routing, blocks, config, folder, order)
    seed_everything(config.seed)
    DLRTrainer(model, config, blocks, folder, policy).fit()
    if learns:
        if config.objective == "controlled":
            calibrate_router(model, routing, bench.calibration, config.target_skip, bf16=config.autocast)
        variant.notes["threshold"] = routing.config.threshold
        save_pretrained(model, folder / "checkpoint")
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    for labels in folder.glob("harm-*.safetensors"):
        labels.unlink()
    return variant


def measure(bench: Bench, variant: Variant, label: str, policy: Policy | None, **notes) -> dict:
    """One row of the results table: `variant` evaluated on the test split under `policy`."""
    table = evaluate(variant.model, variant.routing, bench.test, policy, bf16=variant.config.autocast, describe=label)
    return row_of(bench, variant, label, table, **notes)


def row_of(bench: Bench, variant: Variant, label: str, table: pd.DataFrame, **notes) -> dict:
    """The row of a document table, which is kept for paired comparisons."""
    routing, config = variant.routing, variant.config
    bench.tables[label] = table
    always = routing.first + routing.config.keep_last
    return {"variant": label, "seed": config.seed, "target_skip": config.target_skip, "steps": config.steps,
            **summary(table, always, routing.units_per_layer), **notes}


def base_row(bench: Bench) -> dict:
    """The untouched base model on the test split."""
    routing = attach(bench.base, bench.config.router())
    try:
        variant = Variant("base", bench.config, bench.base, routing)
        return measure(bench, variant, "base", None)
    finally:
        routing.detach()


def best_static_order(bench: Bench) -> list[int]:
    """Greedy order in which a static plan drops the base model's layers; found once a base, data and shape."""
    config = bench.config
    key = f"{identity(bench.base)} {bench.data_hash} {config.always_keep} {config.keep_last} {config.unit} " \
          f"{config.eval_len} {config.autocast} {config.static_docs}"
    path = cache_folder() / f"static-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if bench.order is None and path.is_file():
        bench.order = json.loads(path.read_text(encoding="utf-8"))
    if bench.order is None:
        routing = attach(bench.base, config.router())
        try:
            batches = _first_documents(bench.calibration, config.static_docs)
            bench.order = greedy_static_order(bench.base, routing, batches, bf16=config.autocast)
        finally:
            routing.detach()
        write_atomically(path, json.dumps(bench.order))
    return bench.order


def _first_documents(batches: list[dict], count: int) -> list[dict]:
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
    """A routed model's own row and, on the same weights, the plans it must beat: shuffled, mean, random."""
    routing, name = variant.routing, variant.name
    rows = [measure(bench, variant, name, RouterPolicy(), **variant.notes)]
    measured, keep = rows[0]["skip"], rows[0]["keep_rate"]
    forced = forced_share(bench, routing.config.keep_first_tokens)
    rows.append(measure(bench, variant, f"{name}, shuffled", ShuffledPlan(variant.config.seed)))
    table = evaluate_static(variant.model, routing, bench.test, order_of_mean_plan(keep), measured, forced,
                            bf16=variant.config.autocast)
    rows.append(row_of(bench, variant, f"{name}, mean plan", table))
    rows.append(measure(bench, variant, f"{name}, random plan",
                        RandomPlan(measured / (1 - forced), variant.config.seed)))
    for row in rows[1:]:
        row |= {"against_router": paired_difference(bench.tables[row["variant"]], bench.tables[name])}
    return rows


def static_row(bench: Bench, config: RunConfig, folder: Path, skip: float, order: list[int] | None = None,
               name: str = "best static") -> dict:
    """The static plan along `order` (the greedy one by default) at `skip`, healed by the same LoRA budget."""
    order = order or best_static_order(bench)
    forced = forced_share(bench, config.keep_first_tokens)
    fewer, more, share = static_pair(order, len(order), skip, forced)
    variant = train(bench, name, config, folder, MixedStaticPlan(fewer, more, share))
    save_control(variant.model, variant.routing, folder / "checkpoint", "static", order, skip, forced)
    try:
        table = evaluate_static(variant.model, variant.routing, bench.test, order, skip, forced, bf16=config.autocast)
        return row_of(bench, variant, name, table, order=order)
    finally:
        variant.close()


def dense_row(bench: Bench, config: RunConfig, folder: Path) -> dict:
    """LoRA at full depth with the same steps and data."""
    variant = train(bench, "dense LoRA", config, folder, LayerDrop(0.0))
    save_control(variant.model, variant.routing, folder / "checkpoint", "dense")
    try:
        return measure(bench, variant, "dense LoRA", None)
    finally:
        variant.close()


def stochastic_rows(bench: Bench, config: RunConfig, folder: Path, skips: list[float]) -> list[dict]:
    """LoRA under stochastic depth, evaluated at full depth and with each of `skips` dropped at random."""
    variant = train(bench, "stochastic depth", config, folder, LayerDrop(config.layer_drop or 0.5))
    save_control(variant.model, variant.routing, folder / "checkpoint", "stochastic",
                 skip=config.layer_drop or 0.5)
    try:
        rows = [measure(bench, variant, "stochastic depth, full", None)]
        forced = forced_share(bench, config.keep_first_tokens)
        return rows + [measure(bench, variant, f"stochastic depth, {skip:.0%} dropped",
                               RandomPlan(skip / (1 - forced), config.seed)) for skip in skips]
    finally:
        variant.close()


def against_static(bench: Bench, routed: str) -> dict | None:
    """Paired difference of the routed model and the best static plan (negative: the router wins)."""
    if "best static" not in bench.tables or routed not in bench.tables:
        return None
    return paired_difference(bench.tables[routed], bench.tables["best static"])

