"""The count of what tensors hold: real and fake ones, views, what is let go of."""

import torch
from tiny_models import tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from dlr.measure.storages import Storages, make_fake


def test_live_bytes_peak_and_flops_of_plain_tensors():
    with Storages("first") as count:
        a = torch.ones(256, 64)                                     # 65,536 bytes
        view = a[:10].T
        assert count.live == {"first": 65536}, "a view holds nothing of its own"
        count.part, count.stage = "second", "product"
        b = a @ view
        assert count.live == {"first": 65536, "second": 256 * 10 * 4} and count.flops == 2 * 256 * 64 * 10
        del a
        assert count.live["first"] == 65536, "the view still holds it"
        count.hold(b, "kept")
        del view
        assert +count.live == {"kept": 256 * 10 * 4}
    assert count.peak == {"first": 65536, "second": 256 * 10 * 4}
    assert count.peaks["product"] == count.peak and count.peaks[""].total() == 65536


def test_fake_tensors_count_as_real_ones_do():
    """Forward and backward of a model, with a mask of rows and a value that is asked for."""
    counts = []
    for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
        model = tiny().train()
        if mode:
            make_fake(model, mode)
        ids, mask = torch.ones(3, 20, dtype=torch.long), torch.ones(3, 20)
        count = Storages()
        with mode or torch.enable_grad(), count:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            rows = logits[mask.bool()]
            assert rows.shape == (60, 97) and bool((mask > 0).all())
            rows.float().logsumexp(-1).sum().backward()
        counts.append((count.peak, count.flops))
    assert counts[0] == counts[1] and counts[0][1] > 2 * 3 * 60 * 97 * 32


def test_tied_weights_stay_tied():
    model = tiny("gpt2")
    fake = make_fake(model, FakeTensorMode())
    assert fake.transformer.wte.weight is fake.lm_head.weight
