"""`python -m dlr plan PHASE`: what a training phase takes, before it runs.

What takes seconds to import is imported by the command itself, as in `evalcommand`.
"""

import argparse
import re

from dlr.base.identity import resolved
from dlr.settings import SettingsError, effective, from_text, read_params
from dlr.workbook.phases import PHASES, schema_of

EXAMPLES = """examples:
  python -m dlr plan token_routing --params params/token_routing/qwen2.5-3b-4bit.yaml --memory 8GB
  python -m dlr plan token_routing --params params/token_routing/llama3.1-8b.yaml --card h100
  python -m dlr plan baselines --params params/baselines/qwen2.5-7b.yaml --memory 24GB --processes 4
  python -m dlr plan pareto --params params/pareto/tinyllama.yaml --set seq_len=1024

One training step is rehearsed on tensors without data, so that any machine can say what another
one needs, without a network for the models that the params files name. The exit code is 1 where it
does not fit.
"""
UNITS = {"": 1e9, "gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}


def add_parser(commands) -> None:
    """The `plan` command's arguments."""
    command = commands.add_parser("plan", epilog=EXAMPLES,
                                  help="what a training phase takes, before it runs",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("phase", help="a phase that trains, as for 'run'")
    add("--params", metavar="FILE", help="YAML file of settings, of a run or of a sweep")
    add("--set", action="append", default=[], metavar="name=value",
        help="one setting; may be repeated")
    add("--memory", metavar="8GB", help="memory of one accelerator (default: the card's)")
    add("--card", metavar="NAME", help="whose time is given: h100, a100, rtx4090, ...")
    add("--processes", type=int, default=1, metavar="N",
        help="that train together, one an accelerator (default 1)")


def plan_command(arguments) -> int:
    """Prints the plan of every run there is; 1 where one of them does not fit."""
    from dlr.workbook.planning import CARDS, forecast, remedy
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes} must be 1 or more")
    card = CARDS.get(arguments.card)
    if arguments.card and card is None:
        raise ValueError(f"--card {arguments.card!r} is not one of {', '.join(CARDS)}; give "
                         "--memory instead")
    memory = size_of(arguments.memory) if arguments.memory else card and card.memory
    fits = True
    for number, (name, config) in enumerate(configs_of(arguments)):
        plan = forecast(arguments.phase, config, arguments.processes, memory)
        title = f"{arguments.phase}, {name}: {config.model}, batch {config.batch_size} x " \
                f"{config.seq_len} tokens"
        print("\n" * bool(number) + "\n".join(
            [title, *described(plan, config, arguments.processes, card, arguments.card)]))
        if not plan.fits:
            fits = False
            changes = remedy(arguments.phase, config, arguments.processes, memory)
            print("change first: " + (" ".join(f"--set {key}={value}".replace("True", "true")
                                               for key, value in changes.items()) if changes else
                                      "nothing here suffices; take a larger accelerator"))
    return 0 if fits else 1


def size_of(text: str) -> float:
    """Bytes of '8GB', '24GiB' or '80'. Raises ValueError: it is no size."""
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    try:
        size = float(match[1]) * UNITS[match[2]]
    except (TypeError, ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ValueError(f"--memory {text!r} is no size; give one as in --memory 8GB")
    return size


def configs_of(arguments) -> list[tuple]:
    """(name, settings) of a params file's run, or of a sweep's runs that differ in what they take.

    Raises:
        SettingsError: settings are wrong, or the phase trains nothing.
    """
    from dlr.train.settings import RunConfig
    from dlr.workbook.runner import checked_parameters, effective_of
    from dlr.workbook.sweeps import expand
    phase, schema = arguments.phase, schema_of(arguments.phase)
    if not issubclass(schema, RunConfig):
        known = [name for name, entry in PHASES.items() if issubclass(entry.schema, RunConfig)]
        raise SettingsError(f"{phase} trains nothing that could be planned; the phases that do are "
                            f"{', '.join(known)}")
    sweep = read_params(arguments.params) if arguments.params else {}
    if "grid" not in sweep:
        parameters = checked_parameters(phase, arguments.params, arguments.set)
        return [(parameters.get("run_name") or "default", effective_of(phase, parameters))]
    if sweep.get("phase") != phase:
        raise SettingsError(f"{arguments.params!r} is a sweep of {sweep.get('phase')}, not of "
                            f"{phase}")
    given = checked_parameters(phase, None, arguments.set)
    distinct = {}
    for name, point in expand(sweep):
        config = effective_of(phase, resolved(point, schema) | given)
        same = config.changed(seed=0, run_name="", target_skip=0.4)
        distinct.setdefault(same.model_dump_json(), (name, config))
    return list(distinct.values())


def described(plan, config, processes: int, card, card_name: str | None) -> list[str]:
    """The lines that people read of a plan."""
    from dlr.train.rehearsal import PARTS
    from dlr.workbook.planning import UTILISATION

    def size(count: float | None) -> str:
        return "size unknown" if count is None else f"{count / 1e9:.2f} GB"

    step, lines = plan.step, []
    parameters = ", ".join(f"{part} {step.parameters[part] / 1e6:,.1f} M"
                           for part in PARTS if step.parameters[part])
    lines.append(f"parameters: {parameters}")
    lines.append("memory of each process" * (processes > 1) + "memory" * (processes == 1)
                 + f" at the peak of a step: {size(step.peak.total())}")
    lines += [f"  {part:<16}{size(step.peak[part]):>10}" for part in PARTS if step.peak[part] > 5e5]
    lines.append(f"  {'margin':<16}{size(plan.margin):>10}   context and fragments")
    verdict = "" if plan.memory is None else \
        f" of {size(plan.memory)}: {'it fits' if plan.fits else 'IT DOES NOT FIT'}"
    lines.append(f"needed: {size(plan.needed)}{verdict}")
    if plan.for_speed > 1e8:
        lines.append(f"  of what is free, about {size(plan.for_speed)} more go into larger chunks "
                     "of logits, for speed")
    if processes > 1:
        what = "its part of the base, and the rest," if config.shard else "all of this,"
        lines.append(f"{processes} processes: each holds {what} and computes "
                     f"{config.batch_size // processes} of the batch's {config.batch_size} "
                     "sequences")
    epochs = "" if plan.epochs is None else f", about {plan.epochs:.2f} epochs"
    lines.append(f"training: {plan.trainings} x {config.steps} steps of "
                 f"{config.batch_size * config.accumulation * config.seq_len:,} tokens, "
                 f"{plan.tokens / 1e6:.2f} M tokens each{epochs}")
    lines += [f"  {name:<18}{count / 1e6:>9.2f} M tokens at full depth, once a base"
              for name, count in plan.preparation.items()]
    if plan.validation:
        lines.append(f"  {'validation':<18}{plan.validation / 1e6:>9.2f} M tokens, all trainings")
    lines.append(f"FLOPs: {plan.flops:.2e}, evaluation not counted")
    if card:
        hours = plan.flops / (card.flops * UTILISATION * processes) / 3600
        lines.append(f"time: {hours:.2f} h on {processes} x {card_name}, at {UTILISATION:.0%} of "
                     "its FLOPs")
    fetched = ", ".join(f"{name} {size(count)}" for name, count in plan.downloads.items())
    lines.append(f"downloads: {fetched or 'nothing'}")
    lines.append("a checkpoint: " + ", ".join(f"{size(count)} {name}" for name, count in
                                              plan.checkpoint.items()))
    return lines
