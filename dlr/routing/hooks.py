"""What the hooks of a routed model do in a pass: begin a plan, have it made at layer K, end it.

No layer is wrapped and no parameter renamed. A hook before the decoder notes padding and positions,
a hook before layer K asks the policy for the plan, and routable layers then carry it out, masked
(`masked`) or compact (`compact`).
"""

import dataclasses
import warnings
from threading import get_ident

import torch

from dlr.routing.decoder import NotRoutable, refuse_layerdrop
from dlr.routing.families import CACHES
from dlr.routing.intercept import LOCK
from dlr.routing.masked import FirstPassDone, run_first_pass
from dlr.routing.memory import Memory, memory_of, remember
from dlr.routing.parts import NotCompactable
from dlr.routing.plan import Plan, asked_of_model
from dlr.routing.rows import plan_rows


class RunsMasked(UserWarning):
    """Plans run masked, with the same results and no time saved, although nobody asked for that."""


class Hooks:
    """An object, so that a copy of the model has hooks that ask the copy's own routing."""

    def __init__(self, routing):
        self.routing, self.said = routing, set()

    def before_model(self, module, args, kwargs):
        self.routing.threads.asked[get_ident()] = asked_of_model(kwargs)

    def before_decoder(self, module, args, kwargs):
        routing, current = self.routing, self.routing.current
        if current is not None and current.first_pass:
            return
        if module is not routing.decoder:
            raise NotRoutable("This is a replica of the routed model (torch.nn.DataParallel?), "
                              "which shares its hooks; use one process a device (torchrun, "
                              "accelerate launch).")
        self._end()  # what an interrupted pass of this thread left behind
        for layer in routing.compact_layers or ():
            layer.tidy()
        asked = routing.threads.asked.pop(get_ident(), {})
        if routing.policy is None:
            return
        plan = Plan.begin(args, kwargs, asked, routing.first + routing.config.keep_last,
                          routing.units_per_layer)
        self._check(plan)
        plan.compact = self._runs_compact(kwargs)
        self._begin(plan)
        if routing.strategy == "two_pass" and routing.policy.reads_hidden:
            run_first_pass(plan, module, args, kwargs)

    def before_first_routable(self, module, args, kwargs):
        routing, plan = self.routing, self.routing.current
        if plan is None or plan.gates is not None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        expected = (*plan.real.shape, routing.router.width)
        if hidden.shape != expected:
            raise NotRoutable(f"{type(module).__name__} is given states {tuple(hidden.shape)}, "
                              f"where DLR routes one state a token, {expected}: this family "
                              "carries several, or in another order. Detach the router.")
        plan.real, plan.position = plan.real.to(hidden.device), plan.position.to(hidden.device)
        if not routing.policy.ahead(routing):
            plan.steps = []  # filled by the layers, see `Routing.gate`
            return
        gates, plan.logits = routing.policy(routing, hidden, plan)
        plan.gates = plan.opened(gates, routing.config.keep_first_tokens)
        if plan.compact:
            plan.runs = (plan.gates > 0.5) & plan.real.unsqueeze(-1)
            plan.rows = plan_rows(plan.runs, plan.real)
        routing.threads.plan = plan
        if plan.first_pass:
            raise FirstPassDone

    def after_decoder(self, module, args, output):
        plan = self.routing.current
        if plan is None or plan.first_pass:
            return
        if plan.steps is not None and output is not None:  # None: the pass ended in an error
            self.routing.planned(plan)
            self.routing.threads.plan = plan
        cache = plan.cache if plan.cache is not None else _cache_in(output)
        memory = plan.memory  # `_end` takes it off the plan
        self._end()
        if cache is not None and plan.gates is not None:
            remember(cache, memory)

    # -- one pass ---------------------------------------------------------------------------------
    def _begin(self, plan: Plan) -> None:
        with LOCK:
            self.routing.threads.forget_the_dead()
            self.routing.threads.passes[get_ident()] = plan
            if plan.compact:
                functions: dict = {}           # layers share what a look-up finds
                for layer in self.routing.compact_layers:
                    layer.install(functions)

    def _end(self) -> None:
        """Ends this thread's pass; compact layers go with the last pass that uses them."""
        with LOCK:
            passes = self.routing.threads.passes
            plan = passes.pop(get_ident(), None)
            if not any(other.compact for other in passes.values()):
                for layer in self.routing.compact_layers or ():
                    layer.remove()
        if plan is not None:
            plan.end()

    def _check(self, plan: Plan) -> None:
        """Refuses what cannot be honoured, before anything is computed."""
        routing = self.routing
        if routing.config.kv == "drop" and plan.cache is not None:
            raise ValueError("kv='drop' has no cached form, since skipped tokens would be missing "
                             "from some layers' caches: pass use_cache=False, or use "
                             "kv='complete'.")
        if routing.decoder.training:
            refuse_layerdrop(routing.decoder)
            checkpointing = any(
                getattr(layer, "gradient_checkpointing", False) for layer in routing.layers)
            if routing.units_per_layer == 2 and checkpointing:
                raise NotRoutable("unit='sublayer' cannot be trained with gradient checkpointing, "
                                  "which computes attention and MLP again when their gates are "
                                  "gone. Turn it off, or use unit='layer'.")
        plan.memory = self._memory_of(plan)
        goes_on = plan.cache is not None and memory_of(plan.cache) is not None
        if not goes_on and any(part.is_meta for part in routing.router.parameters()):
            raise NotRoutable("The router's weights were offloaded with the base model's; they are "
                              "few, and are needed before the first skipped layer. Detach, offload "
                              "the base, and attach again.")
        routing.policy.check(routing, plan)

    def _memory_of(self, plan: Plan) -> Memory:
        """What the pass's cache remembers; a cache filled under another router is refused."""
        owner = self.routing.owner
        continues = plan.cache is not None and plan.past is not False
        memory = memory_of(plan.cache) if continues else None
        if memory is not None and memory.owner is not owner:
            raise ValueError("This key/value cache was begun by another router, whose plan decided "
                             "what is in it; go on with that router, or start again with an empty "
                             "cache.")
        return dataclasses.replace(memory or Memory(owner), seen=plan.seen)

    def _runs_compact(self, kwargs: dict) -> bool:
        """Whether this pass is compacted; why not, where that was asked for, is said once."""
        routing = self.routing
        training = routing.decoder.training or getattr(routing.policy, "training", False)
        if routing.execution != "compact" or training:
            return False
        if _records_more(routing.decoder, kwargs):
            return self._masked_because("attention maps (or another record of what layers compute "
                                        "inside) were asked for, which every layer must run for")
        if torch.is_grad_enabled():
            return self._masked_because("gradients are being recorded; use torch.no_grad() or "
                                        "torch.inference_mode()")
        try:
            for layer in routing.compact_layers:
                layer.refresh()
        except NotCompactable as error:  # an adapter has been put in a place that mixes rows
            return self._masked_because(str(error).removesuffix("."))
        return True

    def _masked_because(self, why: str) -> bool:
        if why not in self.said:
            self.said.add(why)
            warnings.warn(f"Plans run masked, with the same results and no time saved: {why}.",
                          RunsMasked, stacklevel=2)
        return False


def _records_more(decoder, kwargs: dict) -> bool:
    """Whether the call asks for a record of what layers compute inside (attention maps, experts).

    Every layer must then run in full, or the record has fewer entries than layers.
    """
    known = {"attentions", *(getattr(decoder, "_can_record_outputs", None) or ())}
    config = getattr(decoder, "config", None)
    for name in (f"output_{kind}" for kind in known - {"hidden_states"}):
        asked = kwargs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            return True
    return False


def _cache_in(output):
    """The cache that a decoder made itself; None: it made none, or the pass ended in an error."""
    named = [getattr(output, name, None) for name in CACHES]
    values = output if isinstance(output, tuple) else named
    return next((value for value in values if hasattr(value, "get_seq_length")), None)
