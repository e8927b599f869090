"""The measurements behind the token analysis: a routed model, its record, its oracle sample, its probes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dlr import analysis, instrument, oracle
from dlr.calibration import threshold_at
from dlr.categories import categories, frequencies, load_spacy, part_of_speech, partition
from dlr.phase_token_analysis import TokenAnalysisConfig
from dlr.data import Documents, load_documents, padded_batches
from dlr.evaluate import calibrate_router, evaluate, paired_difference, perplexity
from dlr.models import load_base
from dlr.opened import Opened, load
from dlr.policy import RouterPolicy, ShuffledPlan
from dlr.predictability import predictability
from dlr.record import Record, record
from dlr.routed import Routing, attach
from dlr.runs import save_tensors

ROWS = 8                  # texts a forward pass of the oracle's instruments
DEPTHS = (0, 1, 2, 4, 8, 12)          # layers after which probes read the state, as far as the model has them


@dataclass
class Study:
    """A routed model and the texts it is studied on."""
    config: TokenAnalysisConfig
    model: torch.nn.Module
    routing: Routing
    tokenizer: object
    test: Documents
    calibration: Documents

    def batches(self, documents: Documents, limit: int, length: int, rows: int = ROWS) -> list[dict]:
        return padded_batches(documents, self.tokenizer, max_len=length, batch_size=rows, limit=limit)


def untrained(seed: int, device: str | None = None) -> Opened:
    """The embedded base under a router of spread random logits: what token-dependence that means nothing looks like."""
    model, tokenizer = load_base(device=device)
    routing = attach(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        last = routing.router.net[-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=generator) * 2.0)
        last.bias.zero_()
    return Opened(model, tokenizer, routing, "routed")


def open_study(config: TokenAnalysisConfig) -> Study:
    """Loads the checkpoint (the embedded router unless another is named) and calibrates its dial where it has none.

    Raises:
        FileNotFoundError: no checkpoint there.
    """
    device = "cuda" if torch.cuda.is_available() else None
    model, tokenizer, routing = untrained(config.seed, device) if config.untrained else \
        load(config.checkpoint or "nano-router", variant="routed", device=device)
    study = Study(config, model, routing, tokenizer, load_documents(config.dataset, "test"),
                  load_documents(config.dataset, "calibration"))
    if not routing.config.curve or routing.config.calibrated_skip is None:
        batches = study.batches(study.calibration, config.calibration_docs, config.eval_len)
        calibrate_router(model, routing, batches, routing.config.calibrated_skip or 0.4, bf16=False)
    return study


def token_frequencies(study: Study) -> torch.Tensor:
    """Counts `[V]` over documents of the training split."""
    texts = load_documents(study.config.dataset, "train").texts[:study.config.frequency_docs]
    return frequencies(texts, study.tokenizer)


def shuffled_gap(study: Study) -> dict:
    """The router's test perplexity, that of its plan dealt out again among tokens, and their paired difference."""
    batches = study.batches(study.test, study.config.record_docs, study.config.eval_len, 16)
    own, shuffled = (evaluate(study.model, study.routing, batches, policy, bf16=False, describe="shuffling the plan")
                     for policy in (RouterPolicy(), ShuffledPlan(study.config.seed)))
    return {"routed": perplexity(own), "shuffled": perplexity(shuffled), **paired_difference(shuffled, own)}


def _instruments(study: Study, documents: Documents, adapters: bool) -> list[instrument.Instrument]:
    batches = study.batches(documents, study.config.oracle_docs, study.config.oracle_len)
    samples = [instrument.open_sample(study.model, study.routing, batch) for batch in batches]
    return [instrument.Instrument(study.model, study.routing, sample, adapters) for sample in samples]


def headroom(study: Study, weights: str) -> tuple[list[dict], dict]:
    """Rows of `oracle.headroom_rows` on one set of weights ('checkpoint' or 'base'), and what made them.

    The second value holds the static order, forward passes, and the oracle's plans by budget as tensors `[n, U]`.
    """
    adapters = weights == "checkpoint"
    held = _instruments(study, study.calibration, adapters)
    order = oracle.static_order(held)
    test = _instruments(study, study.test, adapters)
    thresholds = {budget: threshold_at(study.routing.config.curve, budget) for budget in study.config.budgets}
    table, plans = oracle.headroom(test, order, thresholds)
    rows = [{"weights": weights, **row} for row in oracle.headroom_rows(table)]
    tensors = {f"{weights}.oracle.{budget}": torch.cat(plan).to(torch.uint8) for budget, plan in plans.items()}
    return rows, {"order": order, "passes": sum(i.passes for i in held + test), "tensors": tensors}


def benefits(study: Study) -> dict[str, torch.Tensor]:
    """On the probe sample: what skipping each unit alone costs (kl, loss `[n, U]`) on the base model at full depth, the
    router's gates `[n, U]`, document `[n]`, and states after several depths (`state.0` ...)."""
    config, threshold, parts = study.config, study.routing.config.threshold, []
    depths = tuple(sorted({d for d in (*DEPTHS, study.routing.first) if d <= len(study.routing.layers)}))
    for batch in study.batches(study.test, config.probe_docs, config.oracle_len, 2 * ROWS):
        sample = instrument.open_sample(study.model, study.routing, batch, depths)
        kl, loss = instrument.single_skips(instrument.Instrument(study.model, study.routing, sample, adapters=False))
        gates = instrument.router_plan(instrument.Instrument(study.model, study.routing, sample), threshold)
        parts.append({"kl": kl, "loss": loss, "gates": gates.to(torch.uint8), "document": sample.document,
                      **{f"state.{d}": s for d, s in sample.states.items()}})
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def probe_rows(study: Study, found: dict[str, torch.Tensor]) -> list[dict]:
    """Rows of `predictability`, by depth and kind of probe."""
    states = {int(name.split(".")[1]): value.numpy() for name, value in found.items() if name.startswith("state.")}
    return predictability(states, found["kl"].numpy(), found["document"].numpy(), study.config.seed)


def measure(config: TokenAnalysisConfig, run) -> dict:
    """Everything notebook 07 shows: the record and the samples' tensors into the folder of `run`, the rest its metrics."""
    study = open_study(config)
    record(study.model, study.routing, study.tokenizer, study.test.texts[:config.record_docs], max_len=config.eval_len,
           top=1).save(run.folder / "record")
    save_tensors({"count": token_frequencies(study)}, run.folder / "frequencies.safetensors")
    tokens = Record.load(run.folder / "record")
    kinds = categories(tokens, load_counts(run.folder / "frequencies.safetensors"))
    pipeline = load_spacy()
    if pipeline is not None:
        speech = part_of_speech(tokens, pipeline)
        kinds = kinds.assign(**{f"POS {tag}": speech == tag for tag in np.unique(speech) if tag})
    rows, static, sample = [], {}, benefits(study)
    for kind in config.weights:
        found, static[kind] = headroom(study, kind)
        rows += found
        static[kind]["agreement"] = analysis.agreement_with_static(tokens, static[kind]["order"])
    plans = {name: value for part in static.values() for name, value in part.pop("tensors").items()}
    save_tensors({name: value for name, value in sample.items() if not name.startswith("state")} | plans,
                 run.folder / "oracle.safetensors")
    return run.finish(
        rows, target=study.routing.config.calibrated_skip, skip=tokens.skip_ratio, shuffled=shuffled_gap(study),
        static=static, probes=probe_rows(study, sample), least=10 if config.record_docs > 20 else 2,
        **_statistics(tokens, kinds, sample))


def _statistics(tokens: Record, kinds, sample: dict[str, torch.Tensor]) -> dict:
    """What is read off the record, and off the probe sample, without the model."""
    mine, depth = analysis.free(tokens), tokens.active_layers.double().numpy()
    document, labels = tokens.document.numpy()[mine], {"category": partition(kinds)} | {k: kinds[k].to_numpy() for k in kinds}
    gates, owner = sample["gates"].numpy(), sample["document"].numpy()
    return {
        "categories": analysis.by_category(tokens, kinds).to_dict("records"),
        "information": {name: analysis.mutual_information(label[mine], depth[mine], document)
                        for name, label in labels.items()},
        "variance": analysis.variance_shares(tokens.gates.numpy()[mine]), "collapse": analysis.collapse(tokens),
        "between": analysis.same_word(tokens)[1], "difficulty": analysis.difficulty(tokens).to_dict("records"),
        "benefit": analysis.benefit_correlations(gates, sample["kl"].numpy(), owner).to_dict("records"),
        "benefit_loss": analysis.benefit_correlations(gates, sample["loss"].numpy(), owner).to_dict("records"),
        "position": analysis.by_position(tokens).to_dict("records")}


def load_counts(path: Path) -> torch.Tensor:
    """Token counts `[V]` written by `runs.save_tensors`."""
    from safetensors.torch import load_file
    return load_file(path)["count"]


def verdict(metrics: dict, always_keep: int) -> str:
    """The two answers in words, from metrics.json alone: is the plan token-dependent, how much headroom is captured."""
    gap, shares, between = metrics["shuffled"], metrics["variance"], metrics["between"]
    known = metrics["information"]["category"]
    depends = gap["low"] > 0
    said = "The plan depends on the token" if depends else "Token-dependence is worth nothing that can be measured here"
    lines = [f"**{said}.** Shuffled among "
             f"tokens it costs {gap['nll_difference']:+.4f} nats a token (95 % interval {gap['low']:+.4f} to "
             f"{gap['high']:+.4f}), that is perplexity {gap['shuffled']:.2f} instead of {gap['routed']:.2f}."]
    if shares["layers"] is not None:
        lines[0] += (f" Of the plan's variance {shares['layers']:.0%} lies between layers, as in a static plan, "
                     f"{shares['tokens']:.0%} in how many layers a token runs and {shares['within']:.0%} in which.")
    lines.append(f"Categories explain {known['explained']:.1%} of the entropy of depth, after chance "
                 f"({known['information']:.3f} bits, chance {known['chance']:.3f}); which token it is explains "
                 f"{_percent(between['token'])} of the variance of depth, the rest is context.")
    for flag in metrics["collapse"]["flags"]:
        lines.append(f"Collapse: {flag}.")
    for row in metrics["rows"]:
        interval = f"{_percent(row['captured_low'])} to {_percent(row['captured_high'])}"
        lines.append(f"At {row['skip']:.1%} skip ({row['weights']} weights) the oracle's KL is {row['oracle']:.3f}, "
                     f"the best static plan's {row['static']:.3f}, the router's {row['routed']:.3f}: it captures "
                     f"**{_percent(row['captured'])}** of the headroom (95 % interval {interval}).")
    own = [row for row in metrics["probes"] if row["depth"] == always_keep]
    if own:
        lines.append("Of the variance of a layer's harm on the base model (clipped at its 1st and 99th percentile), probes "
                     f"explain from the state after layer {always_keep}, where the router reads, "
                     + " and ".join(f"{_percent(row['r2'])} ({row['probe']})" for row in own)
                     + f", on documents held out (mean of layers, {own[0]['tokens']:,} tokens).")
    return "\n\n".join(lines)


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None or value != value else f"{value:.0%}"
