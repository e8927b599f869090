"""The variants that a phase trains, which `python -m dlr train` makes and its notebook looks for.

A phase's function returns them for its settings, in the folders where the notebook has them.
"""

from pathlib import Path
from typing import NamedTuple

from dlr.routing.policy import LayerDrop, Policy
from dlr.settings import SettingsError
from dlr.train.controls import meets_target, static_policy, stochastic_policy
from dlr.train.settings import RunConfig
from dlr.workbook import peers, study


class Training(NamedTuple):
    """A variant to train: its name, its folder below the run's, its kind, and its settings.

    The kind is one of `runs.KINDS`: routed, static, dense or stochastic.
    """
    name: str
    folder: str
    kind: str
    config: RunConfig

    def policy(self, bench: study.Bench) -> Policy | None:
        """What it is trained under; None: its own router's plan."""
        config = self.config
        if self.kind == "static":
            order = peers.shortgpt_order(bench, config) if self.name == peers.STATIC \
                else study.best_static_order(bench, config)
            forced = study.forced_share(bench, config.keep_first_tokens)
            return static_policy(config, order, config.target_skip, forced)
        if self.kind == "stochastic":
            return stochastic_policy(config)
        return LayerDrop(0.0) if self.kind == "dense" else None

    def run(self, bench: study.Bench, folder: Path) -> study.Variant:
        """Trains it in the run's `folder`, and leaves calibration and saving to the notebook."""
        return study.train(bench, self.name, self.config, folder / self.folder, self.policy(bench),
                           keep=False)


def _dense(config: RunConfig) -> Training:
    return Training("dense LoRA", "dense", "dense", config)


def _stochastic(config: RunConfig) -> Training:
    return Training("stochastic depth", "stochastic", "stochastic", config)


def baselines(config) -> list[Training]:
    """Of notebook 01."""
    return [_dense(config), _stochastic(config)]


def sequence_routing(config) -> list[Training]:
    """Of notebook 02."""
    return [_dense(config), *(Training(f"lambda = {price:g}", f"lambda-{price:g}", "routed",
                                       config.changed(penalty=price))
                              for price in config.penalties)]


def token_routing(config) -> list[Training]:
    """Of notebook 03. A static plan at a skip that is yet to be measured is left to the notebook.
    """
    trainings = [Training(name, name.replace(" ", "-"), "routed", peers.of_variant(config, name))
                 for name in peers.VERSIONS | peers.PEERS if name in config.variants]
    if meets_target(config) or "DLR" not in config.variants:
        trainings += [Training(name, folder, "static", config) for name, folder in
                      (("best static", "static"), (peers.STATIC, peers.STATIC))
                      if name in config.variants]
    return trainings + [_dense(config)] * ("dense LoRA" in config.variants)


def pareto(config) -> list[Training]:
    """Of notebook 04."""
    if config.point == "baselines":
        return [_dense(config), _stochastic(config.changed(layer_drop=0.5))]
    if config.point == "router":
        return [Training("DLR", "router", "routed", config),
                Training("best static", "static", "static", config)]
    raise SettingsError(f"point={config.point!r} trains nothing: set point=router or "
                        "point=baselines")


def stages(config) -> list[Training]:
    """Of notebook 10."""
    return [Training(stage, stage.replace(" ", "-"), "routed", config.changed(router_share=share))
            for stage, share in (("healed", 0.0), ("end to end", config.learning_share))]


TRAININGS = {"baselines": baselines, "sequence_routing": sequence_routing,
             "token_routing": token_routing, "pareto": pareto, "stages": stages}
