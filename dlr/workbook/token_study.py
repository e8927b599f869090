"""The measurements of the token analysis: a routed model's record, oracle sample and probes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dlr.base.data import Documents, load_documents, padded_batches
from dlr.base.models import load_base
from dlr.base.opened import Opened, load
from dlr.measure import analysis, instrument, oracle
from dlr.measure.categories import categories, frequencies, load_spacy, part_of_speech, partition
from dlr.measure.evaluate import calibrate_router, evaluate, paired_difference, perplexity
from dlr.measure.probes import predictability
from dlr.measure.record import Record, record
from dlr.routing.attach import attach
from dlr.routing.budget import threshold_at
from dlr.routing.handle import Routing
from dlr.routing.policy import RouterPolicy, ShuffledPlan
from dlr.runs import save_tensors
from dlr.workbook.phases.token_analysis import TokenAnalysisConfig

ROWS = 8                              # texts a forward pass of the oracle's instruments
DEPTHS = (0, 1, 2, 4, 8, 12)          # layers after which probes read the state, where there are


@dataclass
class Study:
    """A routed model and the texts it is studied on."""
    config: TokenAnalysisConfig
    model: torch.nn.Module
    routing: Routing
    tokenizer: object
    test: Documents
    calibration: Documents

    def batches(self, documents: Documents, limit: int, length: int, rows: int = ROWS):
        return padded_batches(documents, self.tokenizer, length, rows, limit=limit)

    def instruments(self, documents: Documents, adapters: bool) -> list[instrument.Instrument]:
        """An instrument a batch of the oracle's sample, on the LoRA's weights or the base's."""
        batches = self.batches(documents, self.config.oracle_docs, self.config.oracle_len)
        samples = [instrument.open_sample(self.model, self.routing, batch) for batch in batches]
        return [instrument.Instrument(self.model, self.routing, sample, adapters)
                for sample in samples]


def untrained(seed: int, **loading) -> Opened:
    """The embedded base under random logits: what meaningless token-dependence looks like."""
    model, tokenizer = load_base(**loading)
    routing = attach(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        last = routing.router.net[-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=generator) * 2.0)
        last.bias.zero_()
    return Opened(model, tokenizer, routing, "routed")


def open_study(config: TokenAnalysisConfig) -> Study:
    """Loads the checkpoint, by default the embedded router, and calibrates one without a dial.

    Raises:
        FileNotFoundError: no checkpoint there.
    """
    device = "cuda" if torch.cuda.is_available() else None
    loading = config.loading | {"device": device}
    model, tokenizer, routing = untrained(config.seed, **loading) if config.untrained else \
        load(config.checkpoint or "nano-router", variant="routed", **loading)
    study = Study(config, model, routing, tokenizer, load_documents(config.dataset, "test"),
                  load_documents(config.dataset, "calibration"))
    if not routing.calibration.curve or routing.calibration.skip is None:
        batches = study.batches(study.calibration, config.calibration_docs, config.eval_len)
        calibrate_router(model, routing, batches, routing.calibration.skip or 0.4)
    return study


def token_frequencies(study: Study) -> torch.Tensor:
    """Counts `[V]` over documents of the training split."""
    texts = load_documents(study.config.dataset, "train").texts[:study.config.frequency_docs]
    return frequencies(texts, study.tokenizer)


def shuffled_gap(study: Study) -> dict:
    """Test perplexity of the router and of its plan shuffled, and their paired difference."""
    batches = study.batches(study.test, study.config.record_docs, study.config.eval_len, 16)
    routed, shuffled = (evaluate(study.model, study.routing, batches, policy,
                                 describe="shuffling the plan")
                        for policy in (RouterPolicy(), ShuffledPlan(study.config.seed)))
    return {"routed": perplexity(routed), "shuffled": perplexity(shuffled),
            **paired_difference(shuffled, routed)}


def headroom(study: Study, weights: str) -> tuple[list[dict], dict]:
    """Rows of `oracle.headroom_rows` on one set of weights, 'checkpoint' or 'base', and more.

    The second value holds the static order, the number of forward passes, and the oracle's plans by
    budget as tensors `[n, U]`.
    """
    adapters = weights == "checkpoint"
    calibration = study.instruments(study.calibration, adapters)
    order = oracle.static_order(calibration)
    test = study.instruments(study.test, adapters)
    curve = study.routing.calibration.curve
    table, plans = oracle.headroom(
        test, order, {budget: threshold_at(curve, budget) for budget in study.config.budgets})
    rows = [{"weights": weights, **row} for row in oracle.headroom_rows(table)]
    tensors = {f"{weights}.oracle.{budget}": torch.cat(plan).to(torch.uint8)
               for budget, plan in plans.items()}
    passes = sum(each.passes for each in calibration + test)
    return rows, {"order": order, "passes": passes, "tensors": tensors}


def benefits(study: Study) -> dict[str, torch.Tensor]:
    """On the probe sample: what skipping each unit alone costs the base model at full depth.

    Returns:
        kl and loss `[n, U]`, the router's gates `[n, U]`, document `[n]`, and the states after
        several depths (`state.0` ...) `[n, d]`.
    """
    config, model, routing = study.config, study.model, study.routing
    depths = tuple(sorted(depth for depth in {*DEPTHS, routing.first}
                          if depth <= len(routing.layers)))
    parts = []
    for batch in study.batches(study.test, config.probe_docs, config.oracle_len, 2 * ROWS):
        sample = instrument.open_sample(model, routing, batch, depths)
        dense = instrument.Instrument(model, routing, sample, adapters=False)
        kl, loss = instrument.single_skips(dense)
        gates = instrument.router_plan(instrument.Instrument(model, routing, sample),
                                       routing.calibration.threshold)
        states = {f"state.{depth}": state for depth, state in sample.states.items()}
        parts.append({"kl": kl, "loss": loss, "gates": gates.to(torch.uint8),
                      "document": sample.document, **states})
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def probe_rows(study: Study, sample: dict[str, torch.Tensor]) -> list[dict]:
    """Rows of `predictability`, by depth and kind of probe."""
    states = {int(name.removeprefix("state.")): value.numpy() for name, value in sample.items()
              if name.startswith("state.")}
    return predictability(states, sample["kl"].numpy(), sample["document"].numpy(),
                          study.config.seed)


def measure(config: TokenAnalysisConfig, run) -> dict:
    """All that notebook 07 shows: tensors in the folder of `run`, and then its metrics."""
    study = open_study(config)
    record(study.model, study.routing, study.tokenizer, study.test.texts[:config.record_docs],
           max_len=config.eval_len, top=1).save(run.folder / "record")
    save_tensors({"count": token_frequencies(study)}, run.folder / "frequencies.safetensors")
    tokens = Record.load(run.folder / "record")
    kinds = categories(tokens, load_counts(run.folder / "frequencies.safetensors"))
    pipeline = load_spacy()
    if pipeline is not None:
        speech = part_of_speech(tokens, pipeline)
        kinds = kinds.assign(**{f"POS {tag}": speech == tag for tag in np.unique(speech) if tag})
    sample = benefits(study)
    rows = []
    static = {}
    for weights in config.weights:
        oracle_rows, notes = headroom(study, weights)
        rows += oracle_rows
        agreement = analysis.agreement_with_static(tokens, notes["order"])
        static[weights] = notes | {"agreement": agreement}
    tensors = {name: value for name, value in sample.items() if not name.startswith("state")}
    for part in static.values():
        tensors |= part.pop("tensors")
    save_tensors(tensors, run.folder / "oracle.safetensors")
    return run.finish(
        rows, target=study.routing.calibration.skip, skip=tokens.skip_ratio,
        shuffled=shuffled_gap(study), static=static, probes=probe_rows(study, sample),
        least=10 if config.record_docs > 20 else 2, **_statistics(tokens, kinds, sample))


def _statistics(tokens: Record, kinds, sample: dict[str, torch.Tensor]) -> dict:
    """Statistics of the record and of the probe sample, which need no model."""
    free = analysis.free(tokens)
    depth = tokens.active_layers.double().numpy()[free]
    document = tokens.document.numpy()[free]
    labels = {"category": partition(kinds)} | {name: kinds[name].to_numpy() for name in kinds}
    gates, sample_document = sample["gates"].numpy(), sample["document"].numpy()

    def correlations(harm: str) -> list[dict]:
        table = analysis.benefit_correlations(gates, sample[harm].numpy(), sample_document)
        return table.to_dict("records")
    return {
        "categories": analysis.by_category(tokens, kinds).to_dict("records"),
        "information": {name: analysis.mutual_information(label[free], depth, document)
                        for name, label in labels.items()},
        "variance": analysis.variance_shares(tokens.gates.numpy()[free]),
        "collapse": analysis.collapse(tokens), "between": analysis.same_word(tokens)[1],
        "difficulty": analysis.difficulty(tokens).to_dict("records"),
        "benefit": correlations("kl"), "benefit_loss": correlations("loss"),
        "position": analysis.by_position(tokens).to_dict("records")}


def load_counts(path: Path) -> torch.Tensor:
    """Token counts `[V]` written by `runs.save_tensors`."""
    return load_file(path)["count"]
