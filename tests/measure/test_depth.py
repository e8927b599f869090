"""Predictors of harm are compared at exactly the same skip, between the static plan and the oracle."""

import pytest
import torch
from test_ridge import batches

import dlr
from dlr.measure.depth import depth_rows, plans_at, realised, static_mixture, token_table
from dlr.measure.labels import label_batch
from dlr.routing.config import RouterConfig

DEPTH = RouterConfig(router_class="DepthRouter", always_keep=2, keep_first_tokens=1, book_depth=1.0)


def test_plans_meet_their_skip_and_pay_least():
    harm = (torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0, 0.5, 1, 2, 4])).cumsum(1)
    depths = torch.tensor([0.0, 1, 2, 3, 4])
    for skip in (0.0, 0.25, 0.5, 1.0):
        plan = plans_at(harm, depths, skip, 4)
        assert float(depths[plan].mean()) / 4 == pytest.approx(skip, abs=0.005)
        own = harm.gather(1, plan[:, None]).mean()
        assert own <= static_mixture(harm, depths, skip, 4).mean() + 1e-6
    assert torch.allclose(static_mixture(harm, depths, 0.5, 4).mean(), harm.mean(0)[2], atol=0.2)
    with pytest.raises(ValueError, match="beyond the book"):
        static_mixture(harm[:, :3], depths[:3], 0.9, 4)


@torch.no_grad()
def test_the_oracle_is_best_and_a_constant_is_static(llama):
    routing = dlr.attach(llama, DEPTH)
    text = batches()
    labels = label_batch(llama, routing, text[0])
    same = labels.harm.mean(0)
    table, _ = realised(llama, routing, text, {"table": token_table(labels), "same": lambda given: same.expand(
        len(given), -1)}, [0.5])
    rows = {row["plan"]: row for row in depth_rows(table)}
    assert rows["oracle"]["kl"] < rows["table"]["kl"] and rows["oracle"]["captured"] == 1
    assert rows["same"]["kl"] == pytest.approx(rows["static"]["kl"], rel=0.15)
    assert rows["static"]["difference"] == rows["static"]["captured"] == 0
    assert rows["shuffled"]["kl"] > rows["oracle"]["kl"] and rows["oracle"]["difference_high"] < 0


def test_a_token_not_labelled_has_the_mean_harm(llama):
    routing = dlr.attach(llama, DEPTH)
    labels = label_batch(llama, routing, batches()[0])
    predict = token_table(labels)
    other = labels[torch.arange(2)]
    other.token = torch.tensor([10**6, int(labels.token[0])], dtype=torch.int32)
    harm = predict(other)
    assert torch.allclose(harm[0], labels.harm.mean(0)) and not torch.allclose(harm[1], harm[0])
