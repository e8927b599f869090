"""lm-evaluation-harness on DLR models: its scores are ours, and a router that does not run is an error."""

import json
from types import SimpleNamespace

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from local_tasks import write_tasks

import dlr.bench.run
from dlr.base.data import Documents, padded_batches
from dlr.base.models import load_base
from dlr.base.opened import Opened
from dlr.bench.batches import fitting
from dlr.bench.harness import DLRLM, generated_length
from dlr.bench.metering import Meter, RouterDidNotRun
from dlr.bench.run import run_benchmark
from dlr.bench.table import row_of, scores_table
from dlr.bench.tasks import load_tasks, manager_for
from dlr.bench.wikitext import strided_perplexity, windows
from dlr.measure.evaluate import router_logits
from dlr.routing.attach import attach
from dlr.routing.by_document import RandomByDocument, StaticByDocument, uniform_from
from dlr.routing.config import RouterConfig
from dlr.routing.policy import RouterPolicy, StaticPlan

pytestmark = pytest.mark.usefixtures("by_rows")

TASKS = ["blimp_causative", "arc_challenge", "mmlu_anatomy", "gsm8k"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("tasks") / "data"))


@pytest.fixture(scope="module")
def nano():
    return load_base()


@pytest.fixture
def routed(nano):
    """The embedded model with a router whose logits spread widely; its threshold halves the gates on plain text."""
    model, tokenizer = nano
    torch.manual_seed(0)
    routing = attach(model, RouterConfig())
    with torch.no_grad():
        routing.router.net[-1].weight.normal_()
        routing.router.net[-1].bias.zero_()
    batches = padded_batches(Documents("", "test", ["The array holds items of the list, and returns a number."], ""),
                             tokenizer, 64, 1)
    routing.calibration.threshold = float(router_logits(model, routing, batches)[0].median())
    yield Opened(model, tokenizer, routing, "routed", RouterPolicy(), digest="r")
    routing.detach()


def base_of(nano) -> Opened:
    return Opened(*nano, digest="b")


def dense_of(routed) -> Opened:
    return Opened(*routed, "dense", digest="d")


def responses(lm, data, tasks=TASKS, limit=4, shots=1, gen_tokens=6, reverse=False):
    """Every response of the model, in the order of tasks and documents, and the scores."""
    loaded = load_tasks(tasks, data, shots)
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": gen_tokens}, update=True)
    if reverse:
        loaded["tasks"] = dict(reversed(loaded["tasks"].items()))
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=100)
    return {name: [s["resps"] for s in found["samples"][name]] for name in tasks}, \
        {name: found["results"][name] for name in tasks}


def test_dense_scores_are_the_harness_own_to_the_last_digit(nano, data):
    model, tokenizer = nano
    plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, logits_cache=False)
    ours = DLRLM(loaded=base_of(nano), batch_size=3)
    theirs = responses(plain, data)
    assert responses(ours, data) == theirs
    # The harness's default, which reuses logits, gives the same decisions and the same likelihoods up to rounding.
    cached = responses(HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3), data, ["mmlu_anatomy"])
    assert cached[1]["mmlu_anatomy"]["acc,none"] == theirs[1]["mmlu_anatomy"]["acc,none"]


def test_all_gates_open_give_the_dense_scores_exactly(nano, routed, data):
    dense = responses(DLRLM(loaded=dense_of(routed), batch_size=3), data)
    plain = HFLM(pretrained=nano[0], tokenizer=nano[1], backend="causal", batch_size=3, logits_cache=False)
    assert dense == responses(plain, data)
    routed.routing.calibration.threshold = -1e9
    lm = DLRLM(loaded=routed, batch_size=3)
    assert responses(lm, data) == dense
    assert lm.meter.skip == 0.0 and lm.meter.kept == [lm.meter.scored] * routed.routing.units


def test_routing_changes_scores_and_is_measured(routed, data):
    lm = DLRLM(loaded=routed, batch_size=3)
    found = responses(lm, data)
    assert 0.1 < lm.meter.skip < 0.9 and lm.meter.context > 0
    assert found[0] != responses(DLRLM(loaded=dense_of(routed), batch_size=3), data)[0]


@pytest.mark.parametrize("kind", ["routed", "static", "stochastic", "sequence"])
def test_batch_size_order_and_padding_change_nothing(routed, data, kind):
    routing = routed.routing
    if kind == "static":
        gates = torch.ones(routing.units)
        gates[::2] = 0
        routed.policy = StaticByDocument(torch.ones(routing.units), gates, 0.5)
    elif kind == "stochastic":
        routed.policy = RandomByDocument(0.4)
    elif kind == "sequence":
        routing.config.level = "sequence"

    def measured(batch_size, reverse=False):
        lm = DLRLM(loaded=routed, batch_size=batch_size)
        replies, scores = responses(lm, data, reverse=reverse)
        lm.close()
        meter = lm.meter
        return replies, scores, (meter.scored, meter.context, meter.forced, meter.reach, meter.kept, meter.context_kept)

    reference = measured(1)
    for batch_size, reverse in ((5, False), (16, True)):
        replies, scores, counts = measured(batch_size, reverse)
        assert counts == reference[2]
        for name in TASKS:
            for before, after in zip(reference[0][name], replies[name], strict=True):
                for one, other in zip(before, after, strict=True):
                    if name == "gsm8k":
                        assert one == other
                    else:
                        assert one[0][0] == pytest.approx(other[0][0], abs=2e-4) and one[0][1] == other[0][1]
            assert {k: v for k, v in scores[name].items() if "perplexity" not in k} == reference[1][name]


def test_scored_tokens_are_told_from_context_and_padding(nano, routed, data):
    """Counted by hand: a BLiMP sentence is scored whole; of a multiple-choice question only the answer is."""
    _, tokenizer = nano
    lm = DLRLM(loaded=routed, batch_size=4)
    suite = load_tasks(["blimp_causative", "mmlu_anatomy"], data, 1)
    evaluate(lm, {"tasks": {"b": suite["tasks"]["blimp_causative"]}, "groups": {}}, limit=3, bootstrap_iters=0)
    rows = suite["tasks"]["blimp_causative"].eval_docs.select(range(3))
    lengths = [len(tokenizer(" " + row[key])["input_ids"]) for row in rows for key in ("sentence_good", "sentence_bad")]
    assert (lm.meter.requests, lm.meter.scored, lm.meter.context) == (6, sum(lengths), 0)
    assert lm.meter.forced == 6                                    # the opening token of each sentence
    lm.restart_meter()
    evaluate(lm, {"tasks": {"m": suite["tasks"]["mmlu_anatomy"]}, "groups": {}}, limit=2, bootstrap_iters=0)
    assert lm.meter.requests == 8 and lm.meter.scored == 8 and lm.meter.context > 100 and lm.meter.forced == 0


def test_generation_counts_what_was_generated(routed, data):
    lm = DLRLM(loaded=routed, batch_size=3)
    responses(lm, data, ["gsm8k"], limit=3, gen_tokens=5)
    assert 3 <= lm.meter.scored <= 15 and lm.meter.context > lm.meter.scored


def test_generated_length_ends_at_the_end_token_or_the_padding():
    def decode(tokens):
        return "".join(chr(96 + t) for t in tokens)

    assert generated_length([3, 4, 5], {0}, 1, [], decode) == 3
    assert generated_length([3, 0, 1, 1], {0}, 1, [], decode) == 2
    assert generated_length([3, 4, 1, 1], {0}, 1, ["d"], decode) == 2
    assert generated_length([3, 0, 0], {0}, 0, [], decode) == 2            # the end token is the pad token as well
    assert generated_length([3, 4, 0], {0}, 0, ["d"], decode) == 2
    for rest in ([], [7], [7, 7, 0], [1, 1]):                                # whatever the rest of the batch made it append
        assert generated_length([3, 4, 5, *rest], {0}, 1, ["de"], decode) == 3


# -- fail closed --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["blimp_causative", "gsm8k"])
@pytest.mark.parametrize("how", ["detached", "disabled", "replaced model"])
def test_a_router_that_does_not_run_is_an_error(nano, routed, data, task, how):
    lm = DLRLM(loaded=routed, batch_size=2)
    if how == "detached":
        routed.routing.detach()
    elif how == "disabled":
        routed.routing.policy = None
    else:
        lm._model = load_base()[0]
    with pytest.raises(RouterDidNotRun):
        responses(lm, data, [task])


@pytest.mark.parametrize("policy", [StaticPlan(torch.ones(12)), RouterPolicy()])
def test_another_policy_in_the_routers_place_is_an_error(routed, data, policy):
    lm = DLRLM(loaded=routed, batch_size=2)
    routed.routing.policy = policy
    with pytest.raises(RouterDidNotRun):
        responses(lm, data, ["blimp_causative"])


def test_the_harness_own_records_tell_what_was_skipped(routed, data):
    lm = DLRLM(loaded=routed, batch_size=2)
    responses(lm, data, ["blimp_causative"])
    told = lm.get_model_info()
    assert told["dlr_skip"] == lm.meter.skip and told["dlr_variant"] == "routed" and told["logits_cache"] is False


def test_the_launcher_refuses_a_request_cache(monkeypatch):
    from dlr.bench.__main__ import main
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--model", "dlr", "--use_cache=x", "--tasks", "blimp"])
    with pytest.raises(SystemExit, match="use_cache"):
        main()


def test_a_router_that_stops_half_way_is_an_error(routed, data):
    lm = DLRLM(loaded=routed, batch_size=2)
    responses(lm, data, ["blimp_causative"])
    routed.routing.policy = None
    with pytest.raises(RouterDidNotRun):
        responses(lm, data, ["blimp_causative"])


def test_a_router_that_runs_unasked_is_an_error_too(nano, routed):
    with pytest.raises(ValueError, match="has a router attached"):
        DLRLM(loaded=base_of(nano))


def test_reused_logits_are_refused(nano):
    with pytest.raises(ValueError, match="logits_cache"):
        DLRLM(loaded=base_of(nano), logits_cache=True)
    assert DLRLM(loaded=base_of(nano)).logits_cache is False


@pytest.mark.parametrize("options, message", [
    ({"skp": 0.2}, "no model argument 'skp'; did you mean 'skip'"),
    ({"load_in_8bit": True}, "give load_in_4bit"), ({"peft": "x"}, "adapters come with the checkpoint"),
    ({"pretrained": "x"}, "those the checkpoint names"), ({"parallelize": True}, "one device"),
    ({"trust_remote_code": True}, "never run"), ({"max_batch_size": 4}, "bounds batch_size='auto'"),
    ({"skip": "much"}, "must be a number"), ({"order": "pareto"}, "no use for order"), ({"dtype": "half"}, "not one of"),
    ({"max_length": "long"}, "whole number"), ({"max_length": -5}, "whole number"), ({"batch_size": "²"}, "whole number"),
    ({"load_in_4bit": "maybe"}, "true or false"), ({"add_bos_token": "perhaps"}, "true or false"),
    ({"prefix_token_id": -1}, "token's number"), ({"softmax_dtype": "float99"}, "softmax_dtype='float99' must be"),
    ({"device": "cudaa"}, "not to be had here"), ({"model": ""}, "give a checkpoint's name")])
def test_no_model_argument_is_swallowed(options, message):
    with pytest.raises(ValueError, match=message):
        DLRLM(checkpoint="nano-router", **options)


def test_arguments_that_are_known_act(nano):
    with pytest.warns(UserWarning, match="made on a base in float32, not quantised; this one is bfloat16"):
        lm = DLRLM(checkpoint="nano-router", skip="0.2", dtype="bfloat16", attn_implementation="eager", batch_size="2",
                   add_bos_token=True, trust_remote_code=False)
    assert lm.model.dtype == torch.bfloat16 and lm.model.config._attn_implementation == "eager" and lm.add_bos_token
    routing = lm.loaded.routing
    assert routing.threshold == pytest.approx(routing.calibration.curve[20]) != routing.calibration.threshold
    lm = DLRLM(load_in_4bit="no", max_length="64")                   # as a command line gives them
    assert "4bit" not in type(lm.model.model.layers[0].mlp.up_proj).__name__ and lm.max_length == 64
    with pytest.raises(ValueError, match="give a checkpoint's name"):
        DLRLM(checkpoint="")                                        # an unset variable is not the embedded base
    assert "4bit" in type(DLRLM(load_in_4bit=True).model.model.layers[0].mlp.up_proj).__name__
    with pytest.raises(ValueError, match="dtype would have no effect on a model that is loaded already"):
        DLRLM(loaded=base_of(nano), dtype="bfloat16")


def test_the_launcher_says_in_one_sentence_what_is_wrong(monkeypatch):
    from dlr.bench import __main__ as lm_eval
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--model", "dlr"])
    monkeypatch.setattr(lm_eval, "cli_evaluate", lambda: DLRLM.create_from_arg_string("checkpoint=nano-router,skp=0.2"))
    with pytest.raises(SystemExit, match="error: There is no model argument 'skp'; did you mean 'skip'"):
        lm_eval.main()


# -- as many requests as fit ---------------------------------------------------------------------------------------------
def test_auto_takes_the_most_rows_that_fit_of_each_width(routed, data, monkeypatch):
    lm = DLRLM(loaded=routed, batch_size="auto", max_batch_size="20")
    forward, skips = HFLM._model_call, []

    def small_card(model, ids, *rest):
        if ids.numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits = forward(model, ids, *rest)
        skips.append(routed.routing.policy)
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "_model_call", small_card)
        fits = {width: fitting(lm, width, 20) for width in (8, 50, 400, 600)}
    assert fits[8] == 20 and 5 <= fits[50] <= 10 and fits[400] == fits[600] == 1
    assert lm.meter.requests == lm.meter.scored == 0 and set(skips) == {None}, "dense, and no score"
    assert lm.sizes.of(lm, 64) == 20, "no CPU says what it cannot hold: the bound"
    card = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("dlr.bench.batches.fitting", lambda lm, width, most: width)
    assert [lm.sizes.of(card, width) for width in (3, 7, 3)] == [3, 7, 3], "asked anew for each width"
    found = responses(lm, data, ["blimp_causative"])
    assert lm.meter.skip > 0.1
    lm = DLRLM(loaded=routed, batch_size=20)
    assert responses(lm, data, ["blimp_causative"]) == found


# -- truncation ---------------------------------------------------------------------------------------------------------
def test_long_requests_are_cut_on_the_left_as_the_harness_does_and_counted(nano, data):
    model, tokenizer = nano
    plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, logits_cache=False, max_length=40)
    ours = DLRLM(loaded=base_of(nano), batch_size=3, max_length=40)
    tasks = ["mmlu_anatomy", "gsm8k"]
    assert responses(ours, data, tasks, shots=3) == responses(plain, data, tasks, shots=3)
    assert ours.meter.truncated == ours.meter.requests == 20
    with pytest.raises(ValueError, match="max_gen_toks"):
        responses(ours, data, ["gsm8k"], gen_tokens=40)


# -- the run: resumable, joined as the harness joins ----------------------------------------------------------------------
def test_a_crash_keeps_finished_tasks_and_the_same_call_goes_on(nano, data, tmp_path, monkeypatch):
    names, options = ["blimp_causative", "mmlu_anatomy", "arc_challenge"], {"data_dir": data, "limit": 3}
    seen, real = [], dlr.bench.run._run_task

    def dies_at_arc(lm, name, *rest):
        seen.append(name)
        if name == "arc_challenge" and seen.count(name) == 1:
            raise KeyboardInterrupt
        return real(lm, name, *rest)

    monkeypatch.setattr(dlr.bench.run, "_run_task", dies_at_arc)
    lm = DLRLM(loaded=base_of(nano), batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(lm, names, tmp_path, **options)
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == ["blimp_causative", "mmlu_anatomy"]
    said = []
    found = run_benchmark(lm, names, tmp_path, say=said.append, **options)
    assert seen == [*names, "arc_challenge"] and "2 of 3 tasks" in said[0]
    whole = evaluate(lm, load_tasks(names, data), limit=3)
    for name in names:
        ours, theirs = found["harness"]["results"][name], whole["results"][name]
        assert {k: v for k, v in ours.items() if "," in k} == {k: v for k, v in theirs.items() if "," in k}
    run_benchmark(lm, names, tmp_path, data_dir=data, limit=2)                # another limit is another result
    assert seen.count("blimp_causative") == 2
    lm.loaded.base = {"quantisation": {"load_in_4bit": True}}                  # and another precision another one
    run_benchmark(lm, names[:1], tmp_path, data_dir=data, limit=2)
    assert seen.count("blimp_causative") == 3


def test_half_written_results_are_measured_again(nano, data, tmp_path):
    lm = DLRLM(loaded=base_of(nano), batch_size=4)
    first = run_benchmark(lm, ["blimp_causative"], tmp_path, data_dir=data)
    path = tmp_path / "blimp_causative.json"
    path.write_text(path.read_text()[:100])
    assert run_benchmark(lm, ["blimp_causative"], tmp_path, data_dir=data) == first
    said = json.dumps(first)
    assert data not in said and "site-packages" not in said, "results name no machine's folders"


def test_rows_hold_score_skip_layers_and_flops(routed, data, tmp_path):
    names = ["blimp_causative", "arc_challenge"]
    lm = DLRLM(loaded=routed, batch_size=4)
    row = row_of(lm, run_benchmark(lm, names, tmp_path / "r", data_dir=data, num_fewshot=2), names)
    base = DLRLM(loaded=dense_of(routed), batch_size=4)
    dense = row_of(base, run_benchmark(base, names, tmp_path / "b", data_dir=data, num_fewshot=2), names)
    assert [score["task"] for score in row["scores"]] == names
    assert row["scores"][0]["chance"] == 0.5 and 0.2 < row["scores"][1]["chance"] < 0.34
    assert row["active_layers"] == pytest.approx(4 + 12 * (1 - row["skip"]), abs=1e-9)
    assert row["flops"] < dense["flops"] == row["flops_dense"] and dense["active_layers"] == 16
    assert row["scores"][1]["notes"] and row["truncated"] == 0
    assert row["router_parameters"] == sum(p.numel() for p in routed.routing.router.parameters())
    assert row["adapter_parameters"] == dense["router_parameters"] == dense["added_bytes"] == 0
    shown = scores_table([row, dense, {key: value for key, value in dense.items() if "parameters" not in key}])
    assert shown["router + adapters, parameters"].tolist()[1:] == ["0 + 0", "–"], "older rows do not say"


def test_a_static_plan_meets_the_router_s_skip_on_each_task(routed, data, tmp_path):
    names = ["blimp_causative"]
    lm = DLRLM(loaded=routed, batch_size=4)
    match = run_benchmark(lm, names, tmp_path / "r", data_dir=data)["tasks"]
    wanted = Meter(**match["blimp_causative"]["meter"]).skip
    lm.close()
    units = routed.routing.units
    static = Opened(*routed, "static", StaticByDocument(torch.ones(units), torch.ones(units), 0.0), order=list(range(units)), digest="s")
    lm = DLRLM(loaded=static, batch_size=4)
    run_benchmark(lm, names, tmp_path / "s", data_dir=data, match=match)
    assert lm.meter.skip == pytest.approx(wanted, abs=1 / units)              # a whole unit a document, 7 documents


def test_documents_draw_plans_evenly():
    draws = [uniform_from(f"blimp_causative/{i}") for i in range(4000)]
    assert abs(sum(d < 0.3 for d in draws) / 4000 - 0.3) < 0.03


# -- WikiText -----------------------------------------------------------------------------------------------------------
def test_strided_windows_score_every_token_once_with_enough_context():
    ids = list(range(100))
    steps = windows(ids, 16, 4)
    assert [t for _, scored in steps for t in scored] == ids[1:]
    for context, scored in steps:
        assert context[-1] == scored[0] - 1 and len(context) + len(scored) <= 17
    assert all(len(context) >= 12 for context, _ in steps[1:-1])
    with pytest.raises(ValueError, match="stride"):
        windows(ids, 4, 5)


def test_one_window_is_the_plain_likelihood(nano):
    """A text that fits one window has the perplexity of one forward pass."""
    model, tokenizer = nano
    text = "The array holds a list of values and returns the number of items."
    lm = DLRLM(loaded=base_of(nano))
    found = strided_perplexity(lm, [text])
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert found["token_perplexity"] == pytest.approx(float(torch.tensor(loss).exp()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss * (ids.shape[1] - 1) / len(text) / 0.6931472, rel=1e-5)
    assert found["words"] == 13


def test_the_harness_command_line_knows_our_model():
    from lm_eval.api.registry import get_model
    assert get_model("dlr") is DLRLM
    assert manager_for(["mmlu", "hellaswag", "winogrande", "lambada_openai", "blimp"])


def test_masked_and_compact_execution_agree(routed, data):
    found = {}
    for execution in ("masked", "compact"):
        routed.routing.execution = execution
        lm = DLRLM(loaded=routed, batch_size=3)
        replies, scores = responses(lm, data)
        found[execution] = (replies, scores, lm.meter.kept, lm.meter.context_kept)
    masked, compact = found["masked"], found["compact"]
    assert masked[1:] == compact[1:] and masked[0]["gsm8k"] == compact[0]["gsm8k"]
    for name in TASKS[:3]:
        for one, other in zip(masked[0][name], compact[0][name], strict=True):
            assert [r[0][0] for r in one] == pytest.approx([r[0][0] for r in other], abs=2e-4)
