"""The latency bench measures what it says: equal skips, the right systems, counted operations."""

from typing import get_args

import pandas as pd
import pytest
import torch
from tiny_models import tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import dlr
from dlr.figures.latency import speedups
from dlr.measure import costs, latency
from dlr.measure.flops import flops_per_token
from dlr.measure.shapes import SHAPES, random_model, recorded_gates
from dlr.routing.config import RouterConfig
from dlr.routing.policy import StaticPlan
from dlr.workbook.phases.latency import LatencyConfig

pytestmark = pytest.mark.usefixtures("by_rows")


@pytest.fixture
def subject():
    logits = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    return latency.subject("tiny", logits, [0.25, 0.5], model=tiny(), always_keep=2)


@pytest.mark.parametrize("skip", [0.0, 0.25, 0.4, 1.0])
def test_a_recorded_plan_is_stretched_and_keeps_its_skip_and_its_order(skip):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    gates = recorded_gates(logits, 18, skip)
    assert gates.shape == (50, 18)
    assert 1 - gates.mean().item() == pytest.approx(skip, abs=1e-3)
    gates = recorded_gates(torch.arange(12.0).expand(50, -1), 18, 0.5)
    assert gates[:, :8].max() == 0 and gates[:, 10:].min() == 1


def test_a_short_piece_of_work_follows_tokens_of_the_nominal_skip():
    """The first tokens of a text run deeper than most; truncation to the mean depth would be no fair ceiling for them."""
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    logits[:8] += 5
    subject = latency.subject("tiny", logits, [0.5], model=tiny(), always_keep=2)
    assert subject.gates[0.5][:8].mean() > 0.9
    for tokens in (4, 8, 16):
        assert 1 - subject.plan(0.5, tokens)[:tokens].mean().item() == pytest.approx(0.5, abs=0.07)
    assert torch.equal(subject.plan(0.5).sum(0), subject.gates[0.5].sum(0))


def test_row_costs_are_of_the_plans_rows(subject):
    """On a machine where a product takes as long as it has rows, they allow the layer-count bound of the rows kept; where
    every product takes as long whatever its rows, they allow nothing but what whole layers save."""
    work, rows_seen = latency.Prefill(subject, 2, 15), []
    product = torch.nn.Linear.forward
    for seconds, allowed in ((lambda rows: rows, None), (lambda rows: 30, 1.0)):
        now = [0.0]
        def forward(layer, x):
            rows_seen.append(len(x))
            now[0] += seconds(len(x))
            return product(layer, x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", forward)
            patch.setattr(costs, "timer", lambda: now[0])
            table = costs.row_costs(work, [0.25, 0.5], repeats=3)
        for row, skip in zip(table.itertuples(), (0.25, 0.5)):
            kept = [int(n) for n in subject.plan(skip, 30)[torch.arange(30) % 60].sum(0)]
            assert row.bound == subject.bound(skip) and set(kept) - {0} <= set(rows_seen)
            assert row.product_bound == pytest.approx(allowed or 6 / (2 + sum(kept) / 30))
            assert row.row_cost == pytest.approx(4 * 30 / sum(kept) if allowed else 1.0)


def test_every_system_is_timed_in_turns_and_truncation_has_the_plans_depth(subject):
    table = latency.measure(latency.Prefill(subject, 2, 15), [0.0, 0.25, 0.5], repeats=2)
    assert set(table["system"]) == set(latency.Prefill.systems) and set(table["part"]) == {"layers", "end to end"}
    assert (table["median"] > 0).all() and (table["q1"] <= table["q3"]).all()
    assert subject.active(0.25) == 5 and subject.bound(0.5) == 6 / 4
    assert subject.model.config.num_hidden_layers == 6
    assert table.query("system == 'compact'")["turns"].eq(2).all() and table.query("system == 'masked'")["turns"].eq(1).all()
    work = latency.Prefill(subject, 2, 15)
    with subject.as_system("compact", 0.5, work.tokens):
        work.run()
    assert subject.routing.plan.skip_ratio == pytest.approx(0.5, abs=0.2)


def test_ratios_are_taken_within_a_turn_so_that_drift_falls_out(subject):
    """Time goes as the layers run, on a machine that slows down threefold: speed-ups are the bound, truncation has no lead."""
    depths = [("dense", 0.0, 6), ("truncation", 0.4, 4), ("truncation", 0.4, 5), ("compact", 0.4, 6)]
    run = {"dense": lambda depth: 6, "truncation": lambda depth: depth, "compact": lambda depth: subject.active(0.4)}
    times = pd.DataFrame([{"turn": turn, "part": "layers", "system": system, "skip": skip, "depth": depth,
                           "seconds": slow * run[system](depth)}
                          for turn, slow in enumerate((1.0, 2.0, 2.5, 3.0), 1) for system, skip, depth in depths
                          if (turn, system) != (4, "compact")])
    work = latency.Prefill(subject, 1, 15)
    table = latency._table(subject, work, latency._at_active_depth(subject, times)).set_index("system")
    assert subject.active(0.4) == pytest.approx(4.4)
    assert table.loc["truncation", "median"] == pytest.approx(4.4 * 2.25) and table.loc["compact", "turns"] == 3
    for system in ("truncation", "compact"):
        assert table.loc[system, ["speedup", "speedup_q1", "speedup_q3"]].tolist() == pytest.approx([6 / 4.4] * 3)
        assert table.loc[system, "share_of_truncation"] == table.loc[system, "share_of_bound"] == pytest.approx(1)


@pytest.mark.parametrize("paired", [True, False])
def test_whiskers_of_the_figure_enclose_its_bars(paired):
    """Also for results from before ratios were taken within a turn, which have quartiles of seconds alone."""
    table = pd.DataFrame([{"work": "prefill", "part": "end to end", "batch": 1, "length": 15, "system": "compact", "skip": 0.5,
                           "bound": 1.5, "median": 2.0, "q1": 1.8, "q3": 2.5, "speedup": 1.25, "speedup_q1": 1.1,
                           "speedup_q3": 1.3}])
    table = table if paired else table.drop(columns=["speedup_q1", "speedup_q3"])
    axes = speedups(table).axes[0]
    (whisker,) = axes.collections[0].get_segments()
    assert axes.patches[0].get_height() == 1.25
    assert whisker[:, 1].tolist() == pytest.approx([1.1, 1.3] if paired else [1.25 * 2.0 / 2.5, 1.25 * 2.0 / 1.8])


def test_the_profile_tells_products_attention_and_the_rest_apart(subject):
    table = costs.profile_prefill(latency.Prefill(subject, 2, 60), [0.25, 0.5], repeats=2).set_index("skip")
    assert list(table["system"]) == ["dense", "compact", "compact"]
    assert (table[["products", "attention", "other"]] > 0).all(axis=None)
    for kind in ("products", "attention", "other"):
        assert table.loc[0.5, f"{kind}_at_bound"] == pytest.approx(table.loc[0.0, kind] / subject.bound(0.5))


def test_decoding_leaves_the_context_as_it_was(subject):
    work = latency.Decode(subject, 1, 10, steps=3)
    table = latency.measure(work, [0.5], repeats=1)
    assert set(table["system"]) == {"dense", "truncation", "masked", "compact"}
    layers, whole = (table[table["part"] == part]["median"].to_numpy() for part in ("layers", "end to end"))
    assert len(layers) == len(whole) == 4 and (0 < layers).all() and (layers < whole).all(), "the head is timed apart"
    for depth, cache in work.caches.items():
        assert cache.get_seq_length() == 10 and all(layer.keys.shape[-2] == 10 for layer in cache.layers[:depth])


def test_compact_execution_counts_fewer_operations_and_the_same_keys(subject):
    table = costs.flops_and_memory(latency.Prefill(subject, 1, 60), [0.0, 0.5]).set_index(["system", "skip"])
    def saved(system, column):
        return table.loc[(system, 0.0), column] - table.loc[(system, 0.5), column]

    assert saved("masked", "counted_gflop") == 0
    assert saved("compact", "counted_gflop") == pytest.approx(saved("compact", "closed_form_gflop"), rel=0.25)
    assert (table["counted_gflop"] > table["closed_form_gflop"] * 0.99).all(), "the counter also sees masked attention"
    assert table["kv_mb"].nunique() == 1
    added = sum(p.nbytes for p in subject.routing.router.parameters()) / 1e6
    assert table["added_mb"].tolist() == pytest.approx([0.0] + [added] * 4), "dense weights are the base's alone"


def test_closed_form_equals_the_counter(llama):
    """Without routing, and with whole layers skipped; one token more adds its own row and nothing else."""
    llama.set_attn_implementation("eager")
    ids, length = torch.arange(2, 34).unsqueeze(0), 32
    routing = dlr.attach(llama, RouterConfig(always_keep=2, keep_first_tokens=0), execution="compact")
    for gates in (torch.ones(4), torch.tensor([0.0, 1, 0, 1]), torch.zeros(4)):
        with torch.no_grad(), routing.using(StaticPlan(gates)), FlopCounterMode(display=False) as counter:
            assert all(layer.keys.shape[2] == 32 for layer in llama(ids).past_key_values.layers), "owed keys are made"
        expected = flops_per_token(llama.config, 2 + float(gates.sum()), length) * length
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_a_model_with_its_own_weights_is_capped_and_gets_adapters(subject):
    model = tiny("qwen2")
    ids, expected = torch.arange(2, 9)[None], tiny("qwen2")
    expected.config.num_hidden_layers = 4
    own = latency.subject("own", torch.randn(60, 12), [0.5], layers=4, model=model, always_keep=2, skip_adapter_rank=3)
    assert own.layers == 4 and own.routing.config.skip_adapter_rank == 3 and own.gates[0.5].shape == (60, 2)
    with torch.no_grad(), own.routing.disabled():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert subject.layers == 6 and subject.routing.config.skip_adapter_rank == 0


def test_a_trained_router_is_timed_as_it_is():
    trained = dlr.attach(tiny(), RouterConfig(always_keep=2, router_class="DepthRouter", router_hidden=8, skip_adapter_rank=3))
    with torch.no_grad():
        trained.router.skip.up[0].normal_()
        trained.router.set_order([2, 0, 3, 1])
    timed = latency.subject("own", torch.randn(60, 4), [0.5], model=tiny(), trained=trained).routing
    assert timed is not trained and timed.config.keep_first_tokens == 0 and timed.router.order.tolist() == [2, 0, 3, 1]
    for name, tensor in trained.router.weights().items():
        assert torch.equal(tensor, timed.router.weights()[name]), name


def test_published_shapes_are_the_published_ones():
    """Parameters to the unit, as their publishers' weights have them."""
    published = {"tinyllama-1.1b": 1_100_048_384, "openllama-3b": 3_426_473_600, "qwen2.5-3b": 3_085_938_688,
                 "qwen2.5-7b": 7_615_616_512, "llama3.1-8b": 8_030_261_248}
    for shape, config in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        assert sum(p.numel() for p in model.parameters()) == published[shape], shape
    assert {"nano", *SHAPES} == set(get_args(LatencyConfig.model_fields["shape"].annotation))
    model = random_model("tinyllama-1.1b", 1, torch.bfloat16, attn_implementation="eager")
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all() and model.config._attn_implementation == "eager"


def test_tokens_a_second_the_slowest_turns_and_memory_are_recorded(subject, monkeypatch):
    """Of what `median` is: all tokens of a prefill, one a sequence of a step. A CPU has no figure of memory."""
    for work, tokens in ((latency.Prefill(subject, 2, 15), 30), (latency.Decode(subject, 2, 4, steps=2), 2)):
        table = latency.measure(work, [0.5], ["dense", "compact"], repeats=2)
        assert (table["tokens_per_second"] * table["median"]).tolist() == pytest.approx([tokens] * len(table))
        assert (table["p95"] >= table["median"]).all() and table["peak_gb"].isna().all()
    seen = iter(range(1, 99))
    monkeypatch.setattr(latency, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(seen) * 1e9)
    table = latency.measure(work, [0.5], ["dense"], repeats=2)
    assert table["peak_gb"].tolist() == [3.0, 3.0], "the most of the counted turns"


def test_what_a_layer_costs_by_rows_is_measured_and_the_guard_stays(subject, monkeypatch):
    """On a clock that ticks once a layer begun, running by rows costs one more beginning a layer."""
    monkeypatch.setitem(costs.OVERHEAD, "cpu", 123.0)
    work = latency.Prefill(subject, 1, 15)
    calls, now = [], [0.0]
    for layer in subject.routing.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: (calls.append(1), now.__setitem__(0, now[0] + 1.0))[0])
    monkeypatch.setattr(latency, "timer", lambda: now[0])
    out = costs.rows_overhead(work, repeats=1)
    assert out["milliseconds"] == pytest.approx(1000.0) and out["guard"] == 123.0 == costs.OVERHEAD["cpu"]
    weights = sum(p.numel() for p in subject.routing.layers[-1].parameters())
    assert out["flops"] == pytest.approx(2 * weights * 15), "as long as the dense layer takes"
