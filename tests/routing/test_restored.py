"""Whatever happens while a router is attached, the model goes on and detaching gives the base back, bit for bit."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import PLAIN, SMALL, tiny
from transformers import (AutoModelForCausalLM, BertConfig, BloomConfig, BloomForCausalLM,
                          CLIPVisionConfig, Llama4TextConfig, LlamaConfig, LlamaForCausalLM,
                          LlavaConfig, LlavaForConditionalGeneration, MambaConfig, MixtralConfig,
                          MixtralForCausalLM, OpenAIGPTConfig, OPTConfig, OPTForCausalLM,
                          StaticCache, XLNetConfig, XLNetLMHeadModel)

import dlr
from dlr.routing.config import RouterConfig
from dlr.routing.decoder import NotRoutable
from dlr.routing.hooks import RunsMasked
from dlr.routing.policy import GivenPlan, RandomPlan, RouterPolicy, StaticPlan

pytestmark = [pytest.mark.usefixtures("by_rows"), pytest.mark.filterwarnings("ignore::dlr.routing.attach.RunsMasked")]
OPEN = {"always_keep": 2, "keep_first_tokens": 0}
SETUPS = {"masked": ({}, "masked"), "compact": ({}, "compact"), "sublayer": ({"unit": "sublayer"}, "compact"),
          "two-pass": ({"strategy": "two_pass"}, "masked"), "kv-drop": ({"kv": "drop"}, None)}


def half(model, execution=None, **settings):
    """A router that closes about half the gates."""
    torch.manual_seed(5)
    routing = dlr.attach(model, RouterConfig(**(OPEN | settings)), execution)
    with torch.no_grad():
        routing.router.net[-1].weight.normal_(std=2.0)
        routing.router.net[-1].bias.zero_()
    return routing


def set_up(name: str, model=None):
    """(model, dense logits' model, routing) of one of SETUPS."""
    model = model or tiny()
    settings, execution = SETUPS[name]
    return model, half(model, execution, **settings)


def call(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


def traces(model) -> list[str]:
    """What a routed pass may have left on the modules of a model."""
    modules = dict(model.named_modules())
    configs = {type(m.config).__name__ for m in modules.values() if hasattr(m, "config")}
    return [n for n, m in modules.items() if "forward" in m.__dict__ or "dlr" in n] + [c for c in configs if c == "_Config"]


# -- interrupts, errors, refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("place", ["model.layers.4", "model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.k_proj",
                                   "model.layers.5.mlp.down_proj", "model.layers.1", "dlr_router"])
@torch.no_grad()
def test_an_interrupt_leaves_nothing_behind(setup, place, ids):
    model = tiny()
    dense = call(model, ids)
    model, routing = set_up(setup, model)
    good = call(model, ids)
    assert not torch.equal(good, dense)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt                # the stop button, in the middle of a product

    module = routing.router if place == "dlr_router" else model.get_submodule(place)
    module.forward = stop
    with pytest.raises(KeyboardInterrupt):
        call(model, ids)
    if module.__dict__["forward"] is stop:
        del module.__dict__["forward"]
    else:                                      # a layer's stand-in is still in place and remembers what it stands for
        module.__dict__["forward"].before = None
    with routing.disabled():
        assert torch.equal(call(model, ids), dense)
    assert torch.equal(call(model, ids), good)
    assert not [trace for trace in traces(model) if not trace.startswith("dlr_router")]
    routing.detach()
    assert not traces(model)
    assert torch.equal(call(model, ids), dense)


@torch.no_grad()
def test_detaching_right_after_an_interrupt_gives_the_base_back(ids):
    model = tiny()
    dense = call(model, ids)
    routing = half(model, "compact")
    with pytest.raises(KeyboardInterrupt):
        handle = model.model.layers[4].register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        call(model, ids)
    handle.remove()
    routing.detach()
    assert not traces(model) and torch.equal(call(model, ids), dense)


@torch.no_grad()
def test_a_refused_attach_leaves_no_hook(ids):
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=6, n_head=4)).eval()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())      # noqa: E731
    dense = call(model, ids)
    with pytest.raises(NotRoutable, match="unit='sublayer'"):
        dlr.attach(model, RouterConfig(always_keep=2, unit="sublayer"))
    assert hooks() == 0 and not traces(model)
    half(model)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    dlr.routing_of(model).detach()
    assert hooks() == 0 and torch.equal(call(model, ids), dense)


# -- copies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("setup", SETUPS)
@torch.no_grad()
def test_a_copy_routes_like_the_original_and_is_its_own(setup, ids):
    model, routing = set_up(setup)
    with routing.disabled():
        dense = call(model, ids)
    routed = call(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, ids), routed)
    assert dlr.routing_of(twin) is not routing and dlr.routing_of(twin).router is twin.dlr_router
    dlr.routing_of(twin).router.net[-1].bias.fill_(-100.0)
    closed = call(twin, ids)
    assert not torch.equal(closed, routed)
    assert torch.equal(call(model, ids), routed), "the original follows its own router"
    dlr.routing_of(twin).detach()
    assert torch.equal(call(twin, ids), dense) and not traces(twin)
    assert torch.equal(call(model, ids), routed)


def test_a_copy_of_an_adapted_model_in_training_follows_its_own_plan(ids):
    """An EMA or a reference model is a copy, made in the middle of training."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    routing = half(model)
    model.train()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with dlr.routing_of(each).using(StaticPlan(torch.tensor([1.0, 0.0, 0.0, 1.0]))):
            each(input_ids=ids).logits.sum().backward()
        assert dlr.routing_of(each).plan.skip_ratio == 0.5
    grads = [[p.grad for p in each.parameters() if p.grad is not None] for each in (model, twin)]
    assert len(grads[0]) == len(grads[1]) and all(torch.equal(a, b) for a, b in zip(*grads))
    assert routing.model is model


# -- threads -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_threads_share_a_model_each_with_its_own_text_plan_and_budget():
    model = tiny()
    routing = half(model)
    routing.calibration.curve = [-20.0 + 0.5 * i for i in range(81)]
    texts = [torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 17, 12, 30)]

    def dense(x):
        with routing.disabled():
            return call(model, x)

    def budget(x):
        with dlr.budget(model, skip=0.5):
            return call(model, x)

    def closed(x):
        with routing.using(StaticPlan(torch.zeros(4))):
            return call(model, x)

    works = [dense, budget, closed, lambda x: call(model, x)]
    jobs = [(work, text) for work in works for text in texts[:2]]
    expected = [work(text) for work, text in jobs]
    wrong = []

    def run(place: int):
        try:
            for _ in range(12):
                with torch.no_grad():
                    if not torch.allclose(jobs[place][0](jobs[place][1]), expected[place], atol=1e-5):
                        wrong.append(place)
        except Exception as error:       # noqa: BLE001
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [n for n in traces(model) if not n.startswith("dlr_router")]
    assert len(routing.threads.plans) <= len(jobs) + 1
    call(model, texts[0])
    assert len(routing.threads.plans) == 1, "nothing is kept of threads that ended"


# -- caches ------------------------------------------------------------------------------------------------------------
CACHED = {"sequence, short prompt": ({"level": "sequence", "pool_tokens": 12}, "exact"),
          "sequence, long prompt": ({"level": "sequence", "pool_tokens": 4}, "exact"),
          "token": ({}, "exact"), "prompt": ({}, "prompt"), "consensus": ({}, "consensus")}


@pytest.mark.parametrize("how", ["copied", "repeated", "selected", "reordered"])
@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_what_a_cache_remembers_goes_where_its_rows_go(name, how, ids):
    settings, plan = CACHED[name]
    model = tiny()
    half(model, **settings).decode_plan = plan
    prompt, more = ids[:, :8], ids[:, 8:9]

    def steps(cache, tokens):
        return torch.cat([model((tokens + i) % 97, past_key_values=cache).logits for i in range(6)], 1)

    rows = {"copied": [0, 1, 2], "repeated": [0, 0, 1, 1, 2, 2], "selected": [2, 0], "reordered": [1, 2, 0]}[how]
    cache = model(prompt, use_cache=True).past_key_values
    if how == "copied":
        cache = copy.deepcopy(cache)
    elif how == "repeated":
        cache.batch_repeat_interleave(2)
    elif how == "selected":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        cache.reorder_cache(torch.tensor(rows))
    moved = steps(cache, more[rows])
    if name == "consensus":                                   # the batch decides together: another batch, another plan
        assert moved.shape[0] == len(rows)
    else:
        assert torch.allclose(moved, steps(model(prompt, use_cache=True).past_key_values, more)[rows], atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 8, 12])
@torch.no_grad()
def test_a_sequence_plan_is_the_same_with_and_without_a_cache(length, ids):
    """Prompts shorter than the pool too: what follows completes it."""
    model = tiny()
    routing = half(model, level="sequence", pool_tokens=8)
    whole = call(model, ids)
    assert 0 < routing.plan.skip_ratio
    cache = model(ids[:, :length], use_cache=True).past_key_values
    rest = [model(ids[:, i:i + 1], past_key_values=cache).logits for i in range(length, ids.shape[1])]
    assert torch.allclose(torch.cat(rest, 1), whole[:, length:], atol=1e-4)


@torch.no_grad()
def test_a_cache_that_cannot_tell_what_the_plan_needs_is_refused(ids):
    model = tiny()
    routing = half(model, level="sequence", pool_tokens=4)
    with routing.disabled():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="level='sequence'.*empty cache"):
        model(ids[:, 8:9], past_key_values=cache)
    routing.detach()
    routing = half(model)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    routing.decode_plan = "prompt"
    with pytest.raises(ValueError, match="decode_plan='prompt'.*empty cache"):
        model(ids[:, 8:9], past_key_values=cache)
    twin = copy.deepcopy(cache)
    routing.detach()
    half(model)
    for each in (cache, twin):
        with pytest.raises(ValueError, match="begun by another router"):
            model(ids[:, 8:9], past_key_values=each)


@pytest.mark.parametrize("plan", ["exact", "consensus", "prompt"])
@torch.no_grad()
def test_assisted_decoding_gives_the_greedy_tokens(plan, ids):
    for settings in ({}, {"level": "sequence", "pool_tokens": 12}):
        model = tiny()
        model.generation_config.eos_token_id = None
        half(model, **settings).decode_plan = plan
        prompt = ids[:1, :9]
        base = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
        greedy = model.generate(prompt, **base)
        for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 4}):
            assert torch.equal(model.generate(prompt, **base, **extra), greedy), (settings, extra)


@torch.no_grad()
def test_a_static_cache_that_is_used_again_begins_anew(ids):
    model = tiny()
    half(model, level="sequence", pool_tokens=4)
    cache = StaticCache(model.config, max_cache_len=20)
    logits = [model(x, past_key_values=cache).logits for x in (ids[:, :8], ids[:, 8:10])]
    cache.reset()
    again = [model(x, past_key_values=cache).logits for x in (ids[:, :8], ids[:, 8:10])]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(logits, again))


# -- what else a model may be -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("execution", ["masked", "compact"])
@torch.no_grad()
def test_every_recorded_output_has_an_entry_a_layer(execution, ids):
    model = tiny()
    model.set_attn_implementation("eager")
    half(model, execution)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 6 and len(out.hidden_states) == 7
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, output_attentions=True,
                          return_dict_in_generate=True)
    assert [len(step) for step in made.attentions] == [6, 6]
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)).eval()
    half(experts, execution)
    chosen = experts(ids, output_router_logits=True).router_logits
    assert len(chosen) == 6 and all(len(one) == ids.numel() for one in chosen)


@torch.no_grad()
def test_what_runs_masked_although_it_was_to_be_compact_is_said_once(ids):
    model = tiny()
    model.set_attn_implementation("eager")
    half(model)
    with pytest.warns(RunsMasked, match="attention maps") as said:
        for _ in range(2):
            model(ids, output_attentions=True)
    assert len(said) == 1
    with torch.enable_grad(), pytest.warns(RunsMasked, match="torch.no_grad"):
        model(ids)
    with pytest.warns(RunsMasked, match="kv='drop'"):
        dlr.attach(tiny(), RouterConfig(always_keep=2, kv="drop"))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("execution", ["masked", "compact"])
@torch.no_grad()
def test_an_offloaded_base_is_routed_like_one_in_memory(kind, execution, ids, tmp_path):
    model = tiny()
    dense = call(model, ids)
    half(model, execution)
    routed = call(model, ids)
    dlr.routing_of(model).detach()
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    routing = half(model, execution)
    assert torch.allclose(call(model, ids), routed, atol=1e-5)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(call(model, text)[:, 13:-1].argmax(-1), text[:, 14:])
    routing.detach()
    assert torch.equal(call(model, ids), dense)


@torch.no_grad()
def test_a_router_that_was_offloaded_with_the_base_is_refused(ids):
    model = tiny()
    routing = half(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(NotRoutable, match="offloaded.*attach again"):
        call(model, ids)
    routing.detach()
    half(model)
    call(model, ids)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@torch.no_grad()
def test_a_vision_language_model_s_text_is_routed_padding_known(execution, ids):
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
                              image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL),
                                                      image_token_index=96)).eval()
    ids = ids.clamp(max=90)
    dense = model(input_ids=ids).logits
    routing = half(model, execution)
    assert type(routing.layers[0]).__name__ == "LlamaDecoderLayer"
    routed = model(input_ids=ids).logits
    assert not torch.equal(routed, dense) and 0 < routing.plan.skip_ratio < 1
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictured = torch.cat([torch.full((1, 4), 96), ids[:1]], 1)
    mask = torch.ones_like(pictured)
    mask[:, -3:] = 0
    model(input_ids=pictured, pixel_values=pixels, attention_mask=mask)
    assert routing.plan.real.sum() == mask.sum()
    routing.detach()
    assert torch.equal(model(input_ids=ids).logits, dense)


@torch.no_grad()
def test_three_places_a_token_run_part_by_part(ids):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    config = Qwen2VLConfig(text_config=text, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                                                           "mlp_ratio": 2}, image_token_id=95, video_token_id=94)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    ids = ids.clamp(max=90)
    routing = dlr.attach(model, RouterConfig(**OPEN), "compact")
    gates = (torch.rand(3, 14, 4, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    gates[..., 2] = 0.0
    logits = []
    for execution in ("compact", "masked"):
        routing.execution = execution
        with routing.using(GivenPlan(gates)):
            logits.append(model(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_layers_that_drop_themselves_are_refused(ids):
    config = OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=6, num_attention_heads=4,
                       max_position_embeddings=128, word_embed_proj_dim=32, layerdrop=0.5)
    with pytest.raises(NotRoutable, match="layerdrop=0.5"):
        dlr.attach(OPTForCausalLM(config), RouterConfig(always_keep=2))
    config.layerdrop = 0.0
    model = OPTForCausalLM(config)
    routing = dlr.attach(model, RouterConfig(always_keep=2))
    model.train()
    with routing.using(RouterPolicy(training=True)):
        first = model(ids) and routing.plan
        model(ids)
        assert routing.plan is not first
        model.model.decoder.layerdrop = 0.5
        with pytest.raises(NotRoutable, match="layerdrop=0.5"):
            model(ids)


def test_a_pass_whose_router_was_not_asked_is_an_error(ids):
    """Layer K is left out by somebody else, so that no plan is made for those behind it."""
    model = tiny()
    half(model, "masked")
    layer = model.model.layers[2]
    layer.__dict__["__call__"] = None
    model.model.layers[2] = torch.nn.Identity()
    model.model.layers[2].forward = lambda hidden, **_: hidden
    with pytest.raises(NotRoutable, match="Layer 2 was not called"):
        model(ids)


def test_sublayers_and_gradient_checkpointing_are_refused_together(ids):
    model = tiny()
    half(model, unit="sublayer")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(NotRoutable, match="gradient checkpointing.*unit='layer'"):
        model(ids)


def test_a_replica_of_data_parallel_is_refused(ids):
    model = tiny()
    half(model)
    replica = copy.copy(model.model)             # as DataParallel makes them: other modules, the same hooks
    with pytest.raises(NotRoutable, match="one process a device"):
        replica(ids)


@torch.no_grad()
def test_random_plans_stay_the_base_s_when_everything_is_kept(ids):
    model = tiny()
    dense = call(model, ids)
    with half(model).using(RandomPlan(0.0)):
        assert torch.equal(call(model, ids), dense)


# -- caches again, other builds, torch.compile ------------------------------------------------------------------------
@pytest.mark.parametrize("plan", ["exact", "prompt"])
@torch.no_grad()
def test_a_static_cache_that_was_reset_is_an_empty_one(plan, ids):
    model = tiny()
    half(model).decode_plan = plan
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, model(ids[:, :1]).logits)   # no old plan
    dlr.routing_of(model).detach()
    half(model, always_keep=3)
    cache.reset()
    model(ids, past_key_values=cache)                              # nor another router's


@torch.no_grad()
def test_keys_are_owed_still_after_an_interrupt_and_copies_are_whole(ids):
    model = tiny()
    routing = half(model)
    cache = model(ids, use_cache=True).past_key_values
    with routing.using(StaticPlan(torch.zeros(routing.units))):
        model(ids[:, :1], past_key_values=cache)

    def stop(*_):
        raise KeyboardInterrupt
    handle = model.model.layers[3].self_attn.k_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        cache.layers[3].keys
    handle.remove()
    again = pickle.loads(pickle.dumps(cache))                       # holds keys and values, and nothing of the model
    assert {layer.keys.shape[-2] for layer in (*cache.layers, *again.layers)} == {ids.shape[1] + 1}
    assert torch.equal(again.layers[3].keys, cache.layers[3].keys)
    assert torch.equal(call(pickle.loads(pickle.dumps(model)), ids), call(model, ids))


@torch.no_grad()
def test_a_compiled_model_is_routed(ids):
    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True           # as torch sets it
    small = LlamaConfig(**(SMALL | {"num_hidden_layers": 2}))
    torch.manual_seed(0)
    model = LlamaForCausalLM(small).eval()
    plain, compiled = copy.deepcopy(model), torch.compile(model, backend="eager")
    dense = call(compiled, ids)                                     # a graph made before there are any hooks
    routing = half(compiled, "masked", always_keep=1)
    half(plain, always_keep=1)
    assert dlr.routing_of(model) is dlr.routing_of(compiled) is routing
    assert not torch.allclose(call(plain, ids), dense, atol=1e-5)
    assert torch.allclose(call(compiled, ids), call(plain, ids), atol=1e-5)
    assert dlr.routing.weights.fingerprint(compiled) == dlr.routing.weights.fingerprint(plain)
    routing.detach()
    assert torch.allclose(call(compiled, ids), dense, atol=1e-5)


BUILDS = {  # states told to the decoder; layers that return lists; experts whose choices come along
    "bert": BertConfig(**PLAIN, is_decoder=True),
    "openai-gpt": OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=128),
    "llama4": Llama4TextConfig(**SMALL, head_dim=8, num_local_experts=4, intermediate_size_mlp=48)}


@pytest.mark.parametrize("build", BUILDS)
@torch.no_grad()
def test_other_builds_of_decoders_are_routed(build, ids):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BUILDS[build]).eval()
    dense = model(ids).logits
    routing = half(model)
    with routing.using(StaticPlan(torch.ones(routing.units))):
        assert torch.allclose(model(ids).logits, dense, atol=1e-4)
    with routing.using(StaticPlan(torch.zeros(routing.units))):
        none = model(ids).logits                                    # no row runs a layer that never ran
        routing.execution = "masked"
        assert torch.allclose(model(ids).logits, none, atol=1e-4)
    assert not torch.allclose(none, dense, atol=1e-4)
    routing.detach()
    assert torch.equal(model(ids).logits, dense)


@torch.no_grad()
def test_states_that_are_no_row_a_token_are_refused(ids):
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=32, n_layer=6, n_head=4, d_inner=48)).eval()
    half(model)
    with pytest.raises(NotRoutable, match="one state a token"):
        model(ids)


@torch.no_grad()
def test_recurrent_states_alone_know_how_far_they_are(ids):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=6, state_size=8, pad_token_id=1, bos_token_id=0,
                         eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    routing = half(model, keep_first_tokens=1)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert routing.plan.skip_ratio > 0 or not routing.plan.logits.lt(0).any()       # a step is no first token
    assert torch.equal(text, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                                            use_cache=False))


@torch.no_grad()
def test_an_adapter_that_mixes_rows_runs_masked_and_says_so(ids):
    model = tiny()
    half(model)
    model = get_peft_model(model, LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"])).eval()
    with pytest.warns(RunsMasked, match="ModulesToSaveWrapper"):
        compact = model(input_ids=ids).logits
    dlr.routing_of(model).execution = "masked"
    assert torch.equal(model(input_ids=ids).logits, compact)
