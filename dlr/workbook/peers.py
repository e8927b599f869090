"""Other rules than DLR's, trained and measured as it is: what they change of its settings.

Base, data, steps, skip adapters, LoRA rank and evaluation are the same. Of a published system a
rule's file in `dlr/routing/` says what it holds and what is simplified; `similarity_order` has
ShortGPT's. The first studies' versions are independent gates, which read one state and learn by
gradients from the first step.

    python -m dlr run token_routing --set 'variants=[DLR, MoD, D-LLM, SkipGPT, FlexiDepth, ShortGPT,
        best static]'
"""

from pathlib import Path

from dlr.measure.static import similarity_order
from dlr.routing.attach import attach
from dlr.settings import default_of
from dlr.train.settings import RunConfig
from dlr.workbook import study

# They read states after layers that LoRA changes, so that nothing can be labelled on the base. A
# rule without a controller starts near the budget (keep_bias): few steps would not bring it there.
_LAYERS = {"warm_start": False, "lora_prefix": True, "elastic": False}

GATES = _LAYERS | {"router_class": "Router", "router_hidden": 128}
VERSIONS = {
    "v1": GATES | {"objective": "global_penalty", "router_lr": 1e-2},
    "v2": GATES | {"objective": "original", "router_lr": 1e-2},
    "cold": GATES,
    "DLR": {},
    "DLR without KD": {"kd_weight": 0.0},
}
PEERS = {
    "MoD": _LAYERS | {"router_class": "MoDRouter", "keep_bias": 1.0},
    "D-LLM": _LAYERS | {"router_class": "DLLMRouter", "objective": "token_target",
                        "keep_bias": 0.5, "router_lr": 3e-3},
    "SkipGPT": _LAYERS | {"router_class": "SkipGPTRouter", "objective": "global_target",
                          "keep_bias": 0.5, "router_lr": 3e-3, "unit": "sublayer",
                          "skip_adapter_rank": 0},
    "FlexiDepth": _LAYERS | {"router_class": "FlexiDepthRouter", "keep_bias": 4.0},
}
STATIC = "ShortGPT"        # a peer without a router: another order for the static plan


def of_variant(config: RunConfig, name: str) -> RunConfig:
    """`config` as the variant `name` of notebook 03 changes it, at its own rate if that was set."""
    changes = (VERSIONS | PEERS)[name]
    if config.router_lr != default_of(type(config), "router_lr"):
        changes = {setting: value for setting, value in changes.items() if setting != "router_lr"}
    return config.changed(**changes)


def shortgpt_row(bench: study.Bench, config: RunConfig, folder: Path, skip: float) -> dict:
    """The static plan by block influence, healed and measured as the best static one is."""
    return study.static_row(bench, config, folder, skip, shortgpt_order(bench, config), STATIC)


def shortgpt_order(bench: study.Bench, config: RunConfig) -> list[int]:
    """The base's units from the least block influence to the greatest."""
    routing = attach(bench.base, config.router().changed(router_class="Router"),
                     bf16=config.autocast)
    try:
        return similarity_order(bench.base, routing, bench.calibration)
    finally:
        routing.detach()
