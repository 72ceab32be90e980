"""Step time, memory and energy before any trace: against hand computation, and against published measurements."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from test_architecture import (
    APERTUS_8B,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    MIXTRAL_8X7B,
    QWEN3_1B7,
)

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import before_traces, predict_before_traces
from diffspec.architecture import Transformer, eagle_head, read_architecture
from diffspec.drafters import OverlappedDrafter, RemoteDrafter, WindowedDrafter
from diffspec.first_principles import IDEAL, SPREAD, Efficiency, FirstPrinciples, draws, step_time_from
from diffspec.hardware import accelerator
from diffspec.parameters import parameter_infos
from diffspec.resources import RESERVE_BYTES, activation_bytes, energy_per_token, memory_plan
from diffspec.results import InputError
from diffspec.step_time import BatchState
from diffspec.trees import Tree, TreeAcceptance
from diffspec.workload import Workload

LLAMA, SMALL = read_architecture(LLAMA_8B), read_architecture(LLAMA_1B)
H200 = accelerator("h200")
PAIR = FirstPrinciples(LLAMA, H200, SMALL)
E = Efficiency()


def test_llama_by_hand():
    step = step_time_from(LLAMA, H200, SMALL)
    read = 2 * (8_030_261_248 - 128256 * 4096)
    assert_close(step.weight_read, read / (4.8e12 * 0.75), 1e-12)
    assert_close(step.kv_read, 131072 / (4.8e12 * 0.85), 1e-12)
    assert_close(step.token_compute, read / (989.4e12 * 0.5), 1e-12)  # 2 FLOP, and 2 B, a weight
    assert_close(step.step_overhead, 1e-3 + 32 * 15e-6, 1e-12)
    assert_close(step.draft.pass_base, 2 * 1_235_814_400 / (4.8e12 * 0.75) + 2e-4 + 16 * 15e-6, 1e-12)
    assert_close(step.draft.pass_kv, 32768 / (4.8e12 * 0.85), 1e-12)
    attention = 4 * 4096 * 32 * 512  # half of a prompt of 1,024 tokens
    without_head = read - 2 * 128256 * 4096
    assert_close(step.prefill_token, (without_head + attention) / (989.4e12 * 0.5), 1e-12)
    assert step.experts is None and step.scale_bounded


def test_tensor_parallel_by_hand():
    one, two = step_time_from(LLAMA, H200), step_time_from(LLAMA, H200, tensor_parallel=2)
    assert_close(two.weight_read, one.weight_read / 2, 1e-12)
    assert_close(two.kv_read, one.kv_read / 2, 1e-12)
    moved = 2 * 32 * (2 * 1 / 2) * 4096 * 2  # two all-reduces a layer, ring over two devices, 2 B
    assert_close(two.token_compute, one.token_compute / 2 + moved / (450e9 * 0.7), 1e-12)
    assert_close(two.step_overhead - one.step_overhead, 32 * 2 * 1e-5, 1e-9)
    many = step_time_from(LLAMA, H200, tensor_parallel=16)  # 8 key/value heads: copied beyond 8 devices
    assert_close(many.kv_read, one.kv_read / 8, 1e-12)
    deepseek = read_architecture(DEEPSEEK_V3)
    latent = [step_time_from(deepseek, H200, tensor_parallel=n).kv_read for n in (1, 8)]
    assert_close(latent[1], latent[0], 1e-12)  # every device holds the whole latent cache


def test_a_mixture_of_experts_reads_what_its_tokens_route_to():
    mixtral = read_architecture(MIXTRAL_8X7B)
    step = step_time_from(mixtral, H200, efficiency=IDEAL)
    one = step(BatchState(sequences=1.0, query_tokens=1.0)).verify
    active = 2 * (mixtral.active_parameters - mixtral.embedding_weights)  # bytes met by one token
    compute = active / 989.4e12
    assert_close(one, np.hypot(active / 4.8e12, compute), 1e-9)  # sharpness 2
    all_read = step.weight_read + step.experts.weight_read
    assert_close(all_read * 4.8e12, 2 * (mixtral.parameters - mixtral.embedding_weights), 1e-9)
    assert step(BatchState(sequences=64.0, query_tokens=64.0)).verify > 0.99 * all_read


@pytest.mark.parametrize("kind", ["head", "block", "ngram"])
def test_kinds_of_drafters(kind):
    pair = FirstPrinciples(LLAMA, H200, drafter_kind=kind)
    times = [
        float(pair.step_time()(BatchState(sequences=4.0, draft_passes=k, draft_tokens=4.0 * k)).draft)
        for k in (1.0, 5.0)
    ]
    if kind == "ngram":
        assert pair.drafter is None and times[0] == times[1] < 1e-3
        return
    assert pair.drafter == eagle_head(LLAMA)
    assert_close(times[1] / times[0], 5.0 if kind == "head" else 1.0, 1e-12)
    # EAGLE on Apertus-8B, GH200: 0.46 ms a pass (swiss-ai/apertus-speculative-decoding, fitted)
    measured = FirstPrinciples(read_architecture(APERTUS_8B), accelerator("gh200"), drafter_kind="head").step_time()
    assert 0.5 < measured.draft.pass_base / 0.46e-3 < 2.0


@pytest.mark.parametrize(("name", "kind"), [("eagle", "head"), ("mtp", "head"), ("suffix", "ngram"), ("none", "")])
def test_kinds_have_the_names_that_engines_use(name, kind):
    assert FirstPrinciples(LLAMA, H200, drafter_kind=name) == FirstPrinciples(LLAMA, H200, drafter_kind=kind)


def test_a_drafter_with_a_window_on_other_hardware_beside_the_verifier():
    """The options of a drafter mean its wrappers."""
    l4 = accelerator("l4")
    asked = {"drafter_window": 100.0, "draft_overlap": 0.6, "drafter_hardware": l4, "transfer_latency": 5e-4}
    pair = replace(PAIR, tensor_parallel=2, **asked)
    alone = FirstPrinciples(LLAMA, l4, SMALL).step_time().draft
    expected = OverlappedDrafter(RemoteDrafter(WindowedDrafter(alone, 100.0), 5e-4), 0.6)
    state = BatchState(sequences=4.0, query_tokens=20.0, kv_tokens=4000.0, draft_passes=4.0, draft_tokens=16.0)
    step = pair.step_time()(state)
    assert_close(step.draft, expected.draft(state, step.verify), 1e-12)
    assert_close(step.verify, replace(PAIR, tensor_parallel=2).step_time()(state).verify, 1e-12)
    for name in asked:  # each of them matters
        fewer = {key: value for key, value in asked.items() if key != name and name != "drafter_hardware"}
        assert abs(float(replace(PAIR, tensor_parallel=2, **fewer).step_time()(state).draft / step.draft) - 1) > 1e-3


def test_memory_of_a_drafter_with_a_window_or_a_device_of_its_own():
    window = memory_plan(replace(PAIR, drafter_window=128.0))
    assert_close(window.drafter_kv_bytes_per_token, 32768 * 128 / 1280, 1e-12)
    aside = memory_plan(replace(PAIR, drafter_hardware=accelerator("l4")))
    assert (aside.drafter_bytes, aside.drafter_kv_bytes_per_token) == (0.0, 0.0)
    there = 0.9 * 24e9 - SMALL.weight_bytes - activation_bytes(SMALL, 8192) - RESERVE_BYTES
    assert_close(aside.kv_capacity_tokens, there / 32768, 1e-12)  # the L4 holds fewer tokens than the H200
    big = memory_plan(FirstPrinciples(LLAMA, H200, read_architecture(LLAMA_70B), drafter_hardware=accelerator("l4")))
    assert not big.fits and big.missing_bytes > 120e9


def test_a_drafter_that_abstains_before_any_trace():
    """Tokens per step 1 + p*(E - 1), by the model and by the simulator, which draws the abstentions."""
    from diffspec.analysis.simulated import simulate_answer

    pair = FirstPrinciples(LLAMA, H200, drafter_kind="ngram", draft_probability=0.25)
    load, acceptance = Workload(1024.0, 256.0, concurrency=4.0), ConstantAcceptance(0.7)
    answer = predict_before_traces(pair, load, 4, acceptance=acceptance)
    assert_close(answer["tokens_per_step"], 1 + 0.25 * (float(acceptance.tokens_per_step(4)) - 1), 1e-9)
    assert "share of steps that are drafted for: 0.25" in answer["assumptions"]
    deployment = before_traces(pair).deployment
    config = deployment.configuration(4.0, acceptance=acceptance)
    found, _ = simulate_answer(deployment, load, config, n_requests=200, replications=2)
    assert_close(found["metrics"]["tpot"]["mean"]["value"], answer["tpot"], 0.03)


def test_sliding_windows_shorten_the_cache():
    oss = read_architecture(GPT_OSS_20B)
    short, long = (step_time_from(oss, H200, prompt_length=p, output_length=1e-9).kv_read for p in (128, 128_000))
    assert_close(long / short, 0.5005, 1e-3)


@pytest.mark.parametrize(
    ("config", "base", "token", "cached"),
    [(LLAMA_8B, 5.886e-3, 2.101e-5, 3.926e-8), (QWEN3_1B7, 1.948e-3, 6.80e-6, 3.563e-8)],
)
def test_the_priors_hold_published_step_costs(config, base, token, cached):
    """One H100, vLLM with CUDA graphs: base + token*tokens + cached*kv_tokens, as published."""
    pair = FirstPrinciples(read_architecture(config), accelerator("h100"))
    drawn = jax.vmap(pair.step_time)(draws(E, SPREAD, 128))

    def edges(values):
        return np.quantile(np.asarray(values), (0.025, 0.975))

    low, high = edges(drawn.weight_read + pair.verifier.layers * draws(E, SPREAD, 128).layer_overhead)
    assert low <= base <= high
    low, high = edges(drawn.token_compute)
    assert low <= token <= high
    low, high = edges(drawn.kv_read)  # measured at 96 and 100 % of the data sheet's bandwidth: at the prior's edge
    assert 0.94 * low <= cached <= high


def test_draws_are_the_priors():
    drawn = draws(E, SPREAD, 128)
    again = draws(E, SPREAD, 128)
    infos = parameter_infos(E)
    for path in SPREAD:
        values = np.asarray(getattr(drawn, path))
        assert np.array_equal(values, np.asarray(getattr(again, path))), "draws are the same every time"
        assert infos[path].low < values.min() and values.max() < infos[path].high
        assert_close(np.median(values), float(getattr(E, path)), 0.02)
    logs = np.log(np.asarray(drawn.step_overhead))
    assert_close(logs.std(), SPREAD["step_overhead"], 0.02)
    off = draws(replace(E, draft_overhead=0.0), {"draft_overhead": 1.0}, 4)
    assert np.array_equal(np.asarray(off.draft_overhead), np.zeros(4)), "what is switched off stays off"


def test_memory_by_hand():
    plan = memory_plan(PAIR)
    weights = 2 * (8_030_261_248 + 1_235_814_400)
    assert plan.verifier_bytes + plan.drafter_bytes == weights
    free = 0.9 * 141e9 - weights - activation_bytes(LLAMA, 8192) - RESERVE_BYTES
    assert_close(plan.free_bytes, free, 1e-12)
    assert_close(plan.kv_capacity_tokens, free / (131072 + 32768), 1e-12)
    assert_close(plan.sequences, plan.kv_capacity_tokens / 1280, 1e-12)
    assert plan.fits and plan.missing_bytes == 0
    head = memory_plan(FirstPrinciples(LLAMA, H200, drafter_kind="head"))
    assert_close(head.drafter_bytes, 2 * (LLAMA.shared_weights - 4096) / 32 + 2 * (4096 + 2 * 4096**2), 1e-9)


def test_a_pair_that_does_not_fit_says_by_how_much():
    big = read_architecture(LLAMA_70B)
    plan = memory_plan(FirstPrinciples(big, accelerator("h100"), SMALL))
    needed = big.weight_bytes + SMALL.weight_bytes + activation_bytes(big, 8192) + RESERVE_BYTES
    assert not plan.fits and plan.kv_capacity_tokens == 0
    assert_close(plan.missing_bytes, needed - 0.9 * 80e9, 1e-12)
    assert memory_plan(FirstPrinciples(big, accelerator("h100"), SMALL, tensor_parallel=4)).fits
    long = FirstPrinciples(LLAMA, accelerator("l4"), prompt_length=1e6)  # the weights fit, no such request does
    assert memory_plan(long).missing_bytes == 0 and not memory_plan(long).fits
    with pytest.raises(InputError, match=r"memory_share: got 1\.5"):
        memory_plan(PAIR, memory_share=1.5)


def test_memory_of_a_real_server():
    """Apertus-8B on a GH200: vLLM reported a KV cache of 469,840 tokens (swiss-ai/apertus-speculative-decoding)."""
    plan = memory_plan(FirstPrinciples(read_architecture(APERTUS_8B), accelerator("gh200")))
    assert_close(plan.kv_capacity_tokens, 469_840, 0.1)


def test_energy_by_hand():
    """A step that takes exactly the data sheet's time draws the limit; one twice as long, half of the span."""
    pair = FirstPrinciples(LLAMA, H200, output_length=100.0)
    state = BatchState(sequences=4.0, query_tokens=4.0, kv_tokens=4000.0)
    fast = replace(pair.step_time(IDEAL), sharpness=12.0, token_compute=1e-12)
    prefill = pair.step_time(IDEAL).prefill_token * 1024
    joules, power = energy_per_token(pair, fast, state, 2.0, prefill)
    assert_close(power, 700.0, 1e-3)
    time = float(fast(state).total)
    assert_close(joules, 700.0 * time / 8 + 700.0 * prefill / 100, 1e-3)
    slow = replace(fast, step_overhead=time)
    cached, _ = energy_per_token(pair, fast, state, 2.0, prefill / 2, prefill_tokens=pair.prompt_length / 2)
    decode = power * float(fast(state).total) / (float(state.sequences) * 2.0)
    # half a prompt: the same power, half as long
    assert_close(float(joules - decode), float(2.0 * (cached - decode)), 1e-6)
    _, half = energy_per_token(pair, slow, state, 2.0, prefill)
    assert_close(half, 75 + 625 / 2, 1e-3)
    both = FirstPrinciples(LLAMA, H200, output_length=100.0, tensor_parallel=2)
    assert float(energy_per_token(both, both.step_time(), state, 2.0, prefill)[1]) > 2 * H200.idle_power


def test_energy_of_a_tree_pays_for_its_nodes():
    pair = FirstPrinciples(LLAMA, H200, drafter_kind="head", prompt_length=16.0)
    load = Workload(16.0, 256.0, concurrency=128.0)
    chain, tree = (
        predict_before_traces(pair, load, 2, acceptance=TreeAcceptance(shape, jnp.asarray([[0.6, 0.0, 0.0, 0.0]])))
        for shape in (Tree.regular(1, 2), Tree.regular(4, 2))
    )
    assert tree["tokens_per_step"] == chain["tokens_per_step"]
    seconds = [answer["energy_per_token"]["joules"] / answer["energy_per_token"]["power"] for answer in (chain, tree)]
    assert_close(seconds[1] / seconds[0], tree["tpot"] / chain["tpot"], 0.1)  # the longer step is paid for
    assert tree["tpot"] > 1.5 * chain["tpot"]


def test_efficiencies_out_of_range_are_refused():
    for wrong in ({"memory": 0.0}, {"compute": -1.0}, {"kv": 2.0}, {"step_overhead": float("nan")}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Efficiency(**wrong)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"drafter_kind": "oracle"}, "drafter_kind: got 'oracle'; allowed: model, head, block, ngram"),
        ({"drafter_kind": "model"}, "needs the drafter's config.json"),
        ({"drafter_kind": "ngram", "drafter": SMALL}, "has no weights"),
        ({"tensor_parallel": 0}, "tensor_parallel: got 0"),
        ({"drafter_kind": "none", "drafter": SMALL}, "'none' has no weights"),
        ({"prompt_length": -5.0}, r"prompt_length: got -5\.0"),
        ({"output_length": float("nan")}, "output_length: got nan"),
        ({"draft_probability": 0.5}, "draft_probability needs a drafter"),
        ({"drafter": SMALL, "draft_probability": 1.5}, r"draft_probability: got 1\.5"),
        ({"drafter": SMALL, "draft_overlap": -0.1}, r"draft_overlap: got -0\.1"),
        ({"drafter": SMALL, "drafter_window": 0.0}, r"drafter_window: got 0\.0"),
        ({"drafter": SMALL, "transfer_latency": 1e-3}, "transfer_latency needs a drafter_hardware"),
        ({"drafter_kind": "ngram", "drafter_hardware": H200}, "drafter_hardware: a lookup has no weights"),
    ],
)
def test_what_makes_no_pair_is_said(fields, told):
    with pytest.raises(
        (InputError, TypeError), match=None if isinstance(fields.get("tensor_parallel"), float) else told
    ):
        FirstPrinciples(LLAMA, H200, **fields)


def test_pairs_survive_json():
    import json

    pair = FirstPrinciples(read_architecture(GPT_OSS_20B), H200, drafter_kind="head", tensor_parallel=2)
    assert FirstPrinciples.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    assert pair.name == "gpt_oss + one-layer head for gpt_oss on 2x h200"
    aside = replace(PAIR, drafter_hardware=accelerator("l4"), transfer_latency=1e-3, draft_overlap=0.5)
    aside = replace(aside, drafter_window=64.0, draft_probability=0.9)
    assert FirstPrinciples.from_dict(json.loads(json.dumps(aside.to_dict()))) == aside
    assert aside.name == "llama + llama on h200, drafter on l4"
    older = {name: value for name, value in PAIR.to_dict().items() if not name.startswith(("draft_", "transfer"))}
    assert FirstPrinciples.from_dict(older) == PAIR  # written before a drafter could run elsewhere


def test_time_falls_with_bandwidth_smoothly():
    """The step time is differentiable in what an engine reaches: elasticity -1 of weight reads in bandwidth."""
    slope = jax.grad(lambda share: PAIR.step_time(replace(E, memory=share)).weight_read)(0.5)
    assert_close(slope, -float(PAIR.step_time(replace(E, memory=0.5)).weight_read) / 0.5, 1e-12)
    toy = Transformer("toy", layers=2, hidden=8, vocab=32, heads=2, kv_heads=1, head_dim=4, intermediate=16)
    assert step_time_from(toy, accelerator("cpu")).weight_read > 0
