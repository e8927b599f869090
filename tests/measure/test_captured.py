"""Decoding by captured layers gives what decoding gives, and launches what the plan keeps."""

import pytest
import torch
from tiny_models import tiny
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from dlr.measure import latency
from dlr.measure.captured import CapturedDecode, captured
from dlr.routing.compact import Reached
from dlr.routing.policy import RecordedPlan

pytestmark = pytest.mark.usefixtures("by_rows")


class Again:
    """What a CUDA graph is to its caller: the same call on whatever lies in its inputs' places, its result in one place."""
    replays: list = []

    def __init__(self, run):
        self.run, self.result, self.fresh = run, run(), True          # a capture runs nothing, so the first replay has run

    def replay(self):
        self.replays.append("key" if isinstance(self.result, Reached) else "layer")
        if not self.fresh:
            for place, new in zip(self._tensors(self.result), self._tensors(self.run())):
                place.copy_(new)
        self.fresh = False

    @staticmethod
    def _tensors(result):
        tree = result.args if isinstance(result, Reached) else result
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr(Again, "replays", [])
    logits = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    return latency.subject("tiny", logits, [0.5], model=tiny(), always_keep=2, skip_adapter_rank=2)


@torch.no_grad()
def decoded(subject, ids, steps, layers=None):
    """Logits of steps after a prompt, and keys of all layers."""
    cache = StaticCache(config=subject.model.config, max_cache_len=ids.shape[1] + steps)
    with subject.as_system("compact", 0.5):
        subject.model(ids, past_key_values=cache)
        out = []
        for step in range(steps):
            if layers is None:
                out.append(subject.model(ids[:, step:step + 1], past_key_values=cache).logits.clone())
            else:
                with layers:
                    out.append(subject.model(ids[:, step:step + 1], past_key_values=cache).logits.clone())
    return torch.cat(out, 1), torch.stack([layer.keys for layer in cache.layers])


@pytest.mark.parametrize("batch", [1, 3])
def test_captured_layers_give_the_same_logits_and_keys(subject, batch, ids):
    ids = ids[:batch]
    plain, keys = decoded(subject, ids, 6)
    again, captured_keys = decoded(subject, ids, 6, captured(subject.routing, Again))
    assert torch.allclose(plain, again, atol=1e-6) and torch.allclose(keys, captured_keys, atol=1e-6)
    assert all("forward" not in layer.__dict__ for layer in subject.model.model.layers)


def test_a_skipped_layer_launches_its_key_alone(subject, ids):
    decoded(subject, ids[:1], 6, captured(subject.routing, Again))
    kept = int(RecordedPlan(subject.plan(0.5)).gates[ids.shape[1]:ids.shape[1] + 6].sum())
    assert Again.replays.count("layer") == 6 * subject.routing.first + kept
    assert Again.replays.count("key") == 6 * subject.routing.units - kept


def test_the_work_rewinds_and_the_compiled_model_is_the_dense_one(subject):
    work = CapturedDecode(subject, 1, 10, 4, graph=Again, backend="eager")
    table = latency.measure(work, [0.5], repeats=2)
    assert set(table["system"]) == {"dense", "compiled", "truncation", "compact"}
    assert set(table[table["system"] == "compiled"]["part"]) == {"end to end"}
    cache = work.caches[subject.layers]
    assert {int(layer.cumulative_length) for layer in cache.layers} == {10}
    with torch.no_grad(), subject.as_system("dense", 0.0):
        dense = subject.model(work.prompt).logits
        assert torch.allclose(work.compiled(work.prompt).logits, dense, atol=1e-5)
    assert subject.routing.handles, "the twin alone lost its router"


def test_without_cuda_it_is_refused(subject):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="on 'cpu'.*Leave captured out"):
        CapturedDecode(subject, 1, 10)
