"""Continuations token by token, each token with its depth: the routed model and the dense one.

The two run step by step in turn, each on its own cache and its own continuation, so that a busy
machine slows both alike. LoRA is merged for the routed steps; between steps the model is as it was.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from dlr.base.merged import merged
from dlr.explore.session import Session
from dlr.explore.tokens import piece_bytes
from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import last_only
from dlr.measure.record import document_ids, pieces
from dlr.routing.device import device_of
from dlr.routing.weights import causal_lm


@dataclass
class Side:
    """One of the two continuations; `seconds` are those of `steps`, the prompt's reading apart."""
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float:
        """Decoded tokens a second, NaN before the first."""
        return self.steps / self.seconds if self.seconds else float("nan")


@dataclass
class Progress:
    """What has been generated so far. `bytes` spells pieces that are no whole characters; `lora`
    says whether the routed side ran with it merged."""
    prompt: str
    routed: Side
    dense: Side
    layers: int
    execution: str
    lora: str = ""
    bytes: dict[str, str] = field(default_factory=dict)
    done: bool = False
    stopped: bool = False


class _Stream:
    """One model's cached decoding: the base model's (`lora` None), or the routed one's."""

    def __init__(self, session: Session, prompt: list[int], lora: merged | None,
                 generator: torch.Generator, temperature: float):
        self.session, self.lora = session, lora
        self.generator, self.temperature = generator, temperature
        self.cache, self.side = DynamicCache(), Side()
        self.next = torch.tensor([prompt], device=device_of(session.model))
        self.stop_ids = stop_ids(session)

    def _forward(self) -> torch.Tensor:
        started = time.perf_counter()
        logits = self.session.model(input_ids=self.next, past_key_values=self.cache, use_cache=True,
                                    **last_only(self.session.model)).logits[0, -1].float().cpu()
        if self.side.ids:                                   # the prompt has been read
            self.side.seconds += time.perf_counter() - started
            self.side.steps += 1
        return logits

    def step(self) -> bool:
        """Decodes one token (its depth is known when it is read); False once the text has ended."""
        routing = self.session.routing
        with self.lora or frozen_base(self.session.model, routing):
            logits = self._forward()
        if self.lora and self.side.ids:
            self.side.depths.append(float(routing.plan.active_layers[0, -1]))
        if self.temperature > 0:
            chances = (logits / self.temperature).softmax(-1)
            chosen = int(torch.multinomial(chances, 1, generator=self.generator))
        else:
            chosen = int(logits.argmax())
        self.side.ids.append(chosen)
        self.side.pieces.append(pieces(self.session.tokenizer, [chosen])[0])
        self.next = torch.tensor([[chosen]], device=self.next.device)
        return chosen not in self.stop_ids


def stop_ids(session: Session) -> set[int]:
    """Tokens that end a text, by the tokenizer and by the model's generation settings."""
    settings = getattr(causal_lm(session.model), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return {session.tokenizer.eos_token_id, *named} - {None}


@torch.no_grad()
def generate(session: Session, prompt: str, tokens: int = 60, threshold: float | None = None,
             temperature: float = 0.0, seed: int = 0, dense: bool = True) -> Iterator[Progress]:
    """Yields after every step; stop by not asking for more. Greedy at temperature 0.

    A token's depth is that of the step which reads it, so the newest token's is still to come.

    Raises:
        ValueError: no room is left in the model's context, or a negative number of tokens or
            temperature, or the tokenizer has no opening token.
    """
    if tokens < 1 or temperature < 0:
        raise ValueError(f"tokens={tokens} must be 1 or more and temperature={temperature} 0 or "
                         "more.")
    ids = document_ids(session.tokenizer, prompt, session.model)
    room = session.context - len(ids)
    if room < 1:
        raise ValueError(f"The prompt has {len(ids):,} tokens and the model's context is "
                         f"{session.context:,}; shorten it.")
    routing, lora = session.routing, merged(session.model)
    streams = [_Stream(session, ids, side, torch.Generator().manual_seed(seed), temperature)
               for side in ((lora, None) if dense else (lora,))]
    progress = Progress(prompt, streams[0].side, streams[-1].side if dense else Side(),
                        len(routing.layers), routing.execution, lora.said)
    going = [True] * len(streams)
    for _ in range(min(tokens, room)):
        with routing.at(threshold=threshold):
            going = [alive and stream.step() for alive, stream in zip(going, streams)]
        progress.bytes |= piece_bytes(session.tokenizer, [s.side.ids[-1] for s in streams])
        yield progress
        if not any(going):
            break
    progress.done = True
    yield progress
