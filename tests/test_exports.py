"""Exports of a policy: each against the rules of its engine, the engine's own parser where its files are, and by use.

The engines' examples and refusals are those of their sources and documentation (diffspec/optimizing/engine_rules.py).
"""

import ast
import bisect
import importlib.util
import json
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from test_cli_main import toy_deployment

from diffspec.acceptance import ConstantAcceptance
from diffspec.optimizing.dspark import MOST_PROBES, dspark_tables, export_subject, probes
from diffspec.optimizing.engine_rules import (
    dspark_step_time,
    sglang_slots,
    sglang_steps,
    tensorrt_llm_draft_length,
    vllm_draft_lengths,
)
from diffspec.optimizing.exports import EXPORTS, VERSIONS, check_version, export, exports
from diffspec.optimizing.flags import VLLM_METHODS
from diffspec.optimizing.load_policy import policy
from diffspec.results import InputError, NoResultError

HAND_SET = [[1, 16, 5], [17, 32, 4], [33, 64, 3], [65, 128, 1], [129, 512, 0]]


@pytest.fixture(scope="module")
def deployment():
    return toy_deployment()


@pytest.fixture(scope="module")
def answer(deployment):
    """A real answer whose schedule has several tiers, the last one without drafts."""
    found = policy(
        deployment,
        loads=[2.0, 8.0],
        prompt_length=64.0,
        output_length=64.0,
        max_draft_length=4,
        acceptance=ConstantAcceptance(0.5),
        min_gain=0.001,
    )
    schedule = found["contexts"][0]["schedule"]
    assert len(schedule) >= 3 and schedule[-1][2] == 0, schedule
    return found


@pytest.fixture(scope="module")
def subject(deployment):
    return export_subject(deployment)


def made_up(schedule, forbid_zero=False, bands=None) -> dict:
    """An answer of a given schedule."""
    tiers = [
        {
            "first_batch": a,
            "last_batch": b,
            "draft_length": k,
            "breakeven_tokens_per_step": 1.0 + 0.3 * k if k else None,
        }
        for a, b, k in schedule
    ]
    bands = bands or [{"threshold": b, "down": b + 1, "up": b} for _, b, _ in schedule[:-1]]
    context = {
        "context_length": None,
        "schedule": schedule,
        "tiers": tiers,
        "bands": bands,
        "batches": schedule[-1][1],
        "static_draft_length": max(k for *_, k in schedule),
        "cached_tokens": 100.0,
    }
    return {"contexts": [context], "forbid_zero": forbid_zero, "deployment": "toy"}


def wanted(schedule) -> list[int]:
    return [k for a, b, k in schedule for _ in range(a, b + 1)]


# --- what engines accept ----------------------------------------------------------------------------------------------


def test_vllm_reads_ranges_gaps_and_tails():
    """Gaps and the tail inherit, K is clamped, order does not matter: the cases of vLLM's own documentation."""
    base = {"num_speculative_tokens": 5}
    config = base | {"num_speculative_tokens_per_batch_size": HAND_SET}
    assert vllm_draft_lengths(config, 600) == wanted(HAND_SET) + [0] * 88
    config = base | {"num_speculative_tokens_per_batch_size": [[32, 128, 2], [1, 16, 9]]}
    assert vllm_draft_lengths(config, 130) == [5] * 31 + [2] * 99
    assert vllm_draft_lengths(base, 3) == [5, 5, 5]


@pytest.mark.parametrize(
    "schedule",
    [[], [[1, 2]], [[0, 2, 1]], [[4, 2, 1]], [[1, 2, -1]], [[1, 2, 4], [2, 3, 1]], [[2, 4, 2]], [[1, 2.5, 1]], None],
)
def test_vllm_refuses_bad_schedules(schedule):
    with pytest.raises(InputError, match="num_speculative_tokens_per_batch_size"):
        vllm_draft_lengths({"num_speculative_tokens": 4, "num_speculative_tokens_per_batch_size": schedule}, 8)
    with pytest.raises(InputError, match="num_speculative_tokens: got 0"):
        vllm_draft_lengths({"num_speculative_tokens": 0}, 8)


@pytest.mark.parametrize(
    ("accepted", "steps", "after"),
    # a slot [1, 3, 5, 7] with down_hysteresis -0.25: down at most 0.25, 2.25, 4.25; up above 0.5, 2.5, 4.5
    [(2.6, 3, 5), (2.4, 3, 3), (0.2, 3, 1), (2.2, 5, 3), (0.1, 7, 1), (4.6, 3, 7), (0.6, 1, 3), (0.4, 1, 1)],
)
def test_sglang_moves_between_its_candidates(accepted, steps, after):
    slot = {"candidate_steps": [1, 3, 5, 7], "up_hysteresis": 0.0, "down_hysteresis": -0.25, "ceiling_coeff": 0}
    assert sglang_steps({"1": slot}, 4, accepted, steps) == after


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"1": {"candidate_steps": []}}, "candidate_steps"),
        ({"1": {"candidate_steps": [-1]}}, "candidate_steps"),
        ({"1": {"candidate_steps": [1.5]}}, "candidate_steps"),
        ({"8": {"candidate_steps": [1]}}, "batches from 1"),
        ({"ema_alpha": 0.2}, "batches from 1"),
        ({"1": {"candidate_steps": [1], "hysteresis": 1}}, "hysteresis"),
        ({"1": {"candidate_steps": [1]}, "alpha": 1}, "alpha"),
    ],
)
def test_sglang_refuses_bad_slots(config, message):
    with pytest.raises(InputError, match=message):
        sglang_slots(config)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sample_batch_tokens": [8, 8], "sample_steps_per_sec": [1.0, 2.0], "max_batch_tokens": 8}, "increasing"),
        ({"sample_batch_tokens": [8, 16], "sample_steps_per_sec": [1.0], "max_batch_tokens": 16}, "one a probe"),
        ({"sample_batch_tokens": [], "sample_steps_per_sec": [], "max_batch_tokens": 0}, "increasing"),
        ({"sample_batch_tokens": [8, 16], "sample_steps_per_sec": [1.0, 2.0], "max_batch_tokens": 15}, "largest probe"),
        ({"sample_batch_tokens": [8]}, "cost table"),
        (
            {"bias_seconds": 0.0, "bs_probes": [1], "alpha_seconds": [0], "m_probes": [1], "theta_seconds": [0]},
            "more than 0 s",
        ),
    ],
)
def test_dspark_refuses_bad_tables(table, message):
    with pytest.raises(InputError, match=message):
        dspark_step_time(table, 1, 1)


def test_dspark_reads_a_staircase_and_a_sum():
    """The cases of SGLang's own tests: the last probe not above, clamped at both ends; and the additive form."""
    stairs = {
        "sample_batch_tokens": [8, 16, 32, 64],
        "sample_steps_per_sec": [1000.0, 950.0, 500.0, 480.0],
        "max_batch_tokens": 128,
    }
    read = [1.0 / dspark_step_time(stairs, 1, tokens - 1) for tokens in (1, 8, 16, 31, 63, 64, 10_000)]
    assert read == pytest.approx([1000.0, 1000.0, 950.0, 950.0, 500.0, 480.0, 480.0])
    added = {
        "bias_seconds": 0.1,
        "bs_probes": [128, 192, 256],
        "alpha_seconds": [0.0, 0.008, 0.016],
        "m_probes": [384, 512, 1024],
        "theta_seconds": [0.0, 0.02, 0.1],
    }
    assert dspark_step_time(added, 160, 352) == pytest.approx(0.1 + 0.004 + 0.02)
    assert dspark_step_time(added, 8, 8) == pytest.approx(0.1)
    assert dspark_step_time(added, 500, 5000) == pytest.approx(0.216)


def test_tensorrt_llm_turned_its_keys_around():
    """The examples of both releases: {1:4, 4:2, 8:0} are first batches, {4:4, 8:2, 32:1} last ones."""
    old = [tensorrt_llm_draft_length({1: 4, 4: 2, 8: 0}, 4, n, upper_bounds=False) for n in (1, 3, 4, 7, 8, 100)]
    new = [tensorrt_llm_draft_length({4: 4, 8: 2, 32: 1}, 4, n, upper_bounds=True) for n in (1, 4, 5, 8, 9, 32, 33)]
    assert old == [4, 4, 2, 2, 0, 0] and new == [4, 4, 2, 2, 1, 1, 0]
    for schedule, upper in (
        ({4: 4, 8: 2}, False),
        ({1: 2, 4: 4}, False),
        ({4: 3}, True),
        ({}, True),
        ({4: 2, 8: 4}, True),
    ):
        with pytest.raises(InputError, match="draft_len_schedule"):
            tensorrt_llm_draft_length(schedule, 4, 1, upper_bounds=upper)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_vllm_export_is_the_schedule(answer, subject):
    dynamic, static = export("vllm", answer, subject)
    context = answer["contexts"][0]
    config = json.loads(dynamic.text)
    assert config["method"] == "draft_model" and config["model"] == "tiny"
    assert config["num_speculative_tokens_per_batch_size"] == context["schedule"]
    assert vllm_draft_lengths(config, context["batches"]) == wanted(context["schedule"])
    flag, told = shlex.split(dynamic.flag)
    assert flag == "--speculative-config" and json.loads(told) == config
    assert json.loads(static.text)["num_speculative_tokens"] == context["static_draft_length"]
    assert any("bands" in note for note in dynamic.notes), "and what vLLM cannot do is said"


def test_the_sglang_export_pins_each_tier_and_falls_back_at_break_even(answer, subject):
    (made,) = export("sglang", answer, subject)
    config, context = json.loads(made.text), answer["contexts"][0]
    slots = sglang_slots(config)
    assert sorted(slots) == [first for first, _, _ in context["schedule"]]
    for tier, (first, last, k) in zip(context["tiers"], context["schedule"], strict=True):
        for batch in (first, last):
            if k == 0:
                assert slots[first]["candidate_steps"] == [0]
                continue
            least = tier["breakeven_tokens_per_step"] - 1.0  # accepted drafts a step
            assert sglang_steps(config, batch, least + 0.01, k) == k
            assert sglang_steps(config, batch, least - 0.01, k) == 0
            assert sglang_steps(config, batch, least - 0.01, 0) == k, "and tries again"
    assert f"--speculative-num-draft-tokens {max(k for *_, k in context['schedule']) + 1}" in made.flag
    (never,) = export("sglang", made_up([[1, 8, 3], [9, 64, 1]], forbid_zero=True), subject)
    assert all(0 not in slot["candidate_steps"] for slot in sglang_slots(json.loads(never.text)).values())


@pytest.mark.parametrize(("version", "upper"), [("1.2.0", False), ("1.4.0rc1", True)])
def test_the_tensorrt_llm_export_is_the_schedule_either_way(version, upper, subject):
    schedule = [[1, 8, 3], [9, 20, 2], [21, 64, 0]]
    (made,) = export("tensorrt-llm", made_up(schedule), subject, version)
    lines = made.text.splitlines()
    assert lines[0] == "speculative_config:" and "  max_draft_len: 3" in lines
    table = dict(map(int, line.split(":")) for line in lines[lines.index("  draft_len_schedule:") + 1 :])
    read = [tensorrt_llm_draft_length(table, 3, batch, upper_bounds=upper) for batch in range(1, 65)]
    assert read == wanted(schedule)
    assert table == ({8: 3, 20: 2} if upper else {1: 3, 9: 2, 21: 0})


def test_tensorrt_llm_needs_its_version_and_falling_lengths(answer, subject):
    for version in (None, "1.3.0", "0.20"):
        with pytest.raises(InputError, match="changed sides among its release candidates"):
            export("tensorrt-llm", answer, subject, version)
    with pytest.raises(NoResultError, match="the longest draft"):
        export("tensorrt-llm", made_up([[1, 8, 1], [9, 64, 3]]), subject, "1.4")


@pytest.mark.parametrize("engine", sorted(VERSIONS))
def test_unknown_versions_are_refused_with_what_is_known(engine, answer, subject):
    with pytest.raises(InputError, match=f"got '9.9' for {engine}; known: "):
        export(engine, answer, subject, "9.9")


def test_other_bad_questions(answer, subject):
    with pytest.raises(InputError, match=r"export: got 'tgi'; allowed: vllm, sglang"):
        check_version("tgi", None)
    with pytest.raises(InputError, match="one engine at a time"):
        exports(["vllm", "sglang"], answer, subject, "0.33.0")
    assert {made.engine for made in exports(["sglang", "sglang-dspark", "json"], answer, subject, "0.5.23")} == {
        *("sglang", "sglang-dspark", "json")
    }
    with pytest.raises(NoResultError, match="no schedule"):
        export("vllm", {"contexts": []}, subject)


def test_off_is_off_everywhere(subject):
    off = made_up([[1, 64, 0]])
    for engine, version in (("vllm", None), ("sglang", None), ("tensorrt-llm", "1.4")):
        (made,) = export(engine, off, subject, version)
        assert made.flag is None and any("left off" in note for note in made.notes), engine
    with pytest.raises(NoResultError, match="left off"):
        export("sglang-dspark", off, subject)


def test_step_costs_are_those_of_the_model(answer, subject, deployment):
    """At its probes the first table is the model's step exactly; the additive one is as close as it says."""
    diagonal, additive = (json.loads(made.text) for made in export("sglang-dspark", answer, subject))
    k = max(length for *_, length in answer["contexts"][0]["schedule"])
    tokens = np.array(diagonal["sample_batch_tokens"], dtype=float)
    step = subject["step_time"](float(k), tokens / (1 + k), tokens, answer["contexts"][0]["cached_tokens"])
    assert [dspark_step_time(diagonal, 1, int(m) - 1) for m in tokens] == pytest.approx(step, rel=1e-12)
    assert np.all(np.diff(diagonal["sample_steps_per_sec"]) <= 0), "steps only grow with their tokens"
    for requests, budget in ((1, 0), (8, 16), (64, 64 * k)):
        arrays = (np.array([float(requests)]), np.array([float(requests + budget)]))
        model = subject["step_time"](float(k), *arrays, answer["contexts"][0]["cached_tokens"])[0]
        assert dspark_step_time(additive, requests, budget) == pytest.approx(model, rel=1e-6), "affine costs add up"


def test_the_additive_form_says_how_far_it_is_off():
    """A step time that does not add up: the error told is that of the worst cell, and it is the least squares fit's."""

    def step_time(length, sequences, tokens, context):
        return 0.01 + 1e-5 * sequences * np.sqrt(tokens)

    _, additive, error = dspark_tables(step_time, 3, 16, 100.0)
    worst = max(
        abs(dspark_step_time(additive, r, m - r) / float(step_time(3, float(r), float(m), 0)) - 1)
        for r in additive["bs_probes"]
        for m in additive["m_probes"]
        if r <= m <= 4 * r
    )
    assert error == pytest.approx(worst, rel=1e-6) and 1e-4 < error < 0.2


def test_probes_are_few_and_reach_the_end():
    for last in (1, 2, 24, 25, 100, 4096):
        found = probes(last)
        assert found[0] == 1 and found[-1] == last and len(found) == min(last, MOST_PROBES)
        assert found == sorted(set(found))


# --- the look-up ------------------------------------------------------------------------------------------------------


def loaded(source: str) -> dict:
    tree = ast.parse(source)
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    names: dict = {}
    exec(compile(tree, "draft_length.py", "exec"), names)
    return names


def test_the_look_up_follows_the_schedule_and_its_bands(answer, subject):
    (made,) = export("python", answer, subject)
    names = loaded(made.text)
    context = answer["contexts"][0]
    plain = wanted(context["schedule"])
    look = names["DraftLength"]()
    rising = [look(batch) for batch in range(1, 65)]
    falling = [look(batch) for batch in range(64, 0, -1)][::-1]
    for (_, last, k), (_, _, after), band in zip(
        context["schedule"], context["schedule"][1:], context["bands"], strict=False
    ):
        assert rising[last - 1] == rising[band["up"] - 1] == k and rising[band["up"]] == after
        assert falling[last] == falling[band["down"] - 1] == after
        assert band["down"] == 1 or falling[band["down"] - 2] == k
    fresh = [names["DraftLength"]()(batch) for batch in range(1, 65)]
    middle = {batch for a, b, _ in context["schedule"] for batch in ((a + b) // 2,)}
    assert all(fresh[batch - 1] == plain[batch - 1] for batch in middle if _clear(batch, context["bands"]))
    assert set(rising) == set(falling) == set(plain)


def _clear(batch, bands) -> bool:
    return not any(band["down"] <= batch <= band["up"] for band in bands)


def test_the_look_up_does_not_flap(subject):
    """Around a threshold of 8 with a band from 6 to 11, batches between never change the draft length."""
    bands = [{"threshold": 8, "down": 6, "up": 11}]
    (made,) = export("python", made_up([[1, 8, 3], [9, 64, 1]], bands=bands), subject)
    look = loaded(made.text)["DraftLength"]()
    assert [look(batch) for batch in (5, 8, 9, 11, 8, 12, 9, 8, 6, 5, 6)] == [3, 3, 3, 3, 3, 1, 1, 1, 1, 3, 3]


def test_the_look_up_falls_back_and_tries_again(subject):
    (made,) = export("python", made_up([[1, 8, 3], [9, 64, 0]]), subject)  # break-even at 1.9 tokens a step
    look = loaded(made.text)["DraftLength"](retry=3)
    assert look(4, tokens_per_step=1.95) == 3
    assert [look(4, tokens_per_step=1.85), look(4), look(4), look(4), look(4)] == [0, 0, 0, 0, 3]
    (made,) = export("python", made_up([[1, 8, 3], [9, 64, 1]], forbid_zero=True), subject)
    assert loaded(made.text)["DraftLength"]()(4, tokens_per_step=1.0) == 3, "zero is forbidden"


def test_the_look_up_knows_context_lengths(subject):
    both = made_up([[1, 8, 3], [9, 64, 0]])
    far = made_up([[1, 64, 5]])["contexts"][0] | {"context_length": 10_000.0}
    both["contexts"] = [both["contexts"][0] | {"context_length": 100.0}, far]
    names = loaded(export("python", both, subject)[0].text)
    look = names["DraftLength"]()
    assert [look(40, context_length=length) for length in (50.0, 999.0, 1001.0, 1e6)] == [0, 0, 5, 5]
    vllm = export("vllm", both, subject)
    assert {made.file for made in vllm} >= {"vllm_speculative_config_context_100.json"}
    assert all(any("no context length" in note for note in made.notes) for made in vllm)


def test_every_export_can_be_made(answer, subject):
    for engine in EXPORTS:
        version = "1.4" if engine == "tensorrt-llm" else None
        for made in export(engine, answer, subject, version):
            assert made.text.endswith("\n") and made.file and made.engine == engine


# --- the engines' own parsers, where their Python files are -----------------------------------------------------------
#
# Engines do not import without their devices and a hundred packages; the files with the parsers need next to nothing.
# So only these are loaded, from wherever the package lies: installed, or an unpacked wheel on PYTHONPATH.


def engine_file(name: str) -> Path:
    """The path of ``package/and/file.py`` of an engine; the test is skipped where there is none."""
    package, _, inside = name.partition("/")
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    what = "is not here" if found is None else f"has no {inside} here"
    pytest.skip(f"{package} {what}: its parser is not asked (an unpacked wheel on PYTHONPATH is enough)")


def engine_module(name: str, monkeypatch):
    """One file of an engine as a module; what it imports from the engine itself does nothing."""
    path = engine_file(name)
    package = name.partition("/")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            stub = types.ModuleType(str(node.module))
            for alias in node.names:
                setattr(stub, alias.name, lambda *args, **kwargs: None)
            monkeypatch.setitem(sys.modules, str(node.module), stub)
    found = importlib.util.spec_from_file_location(f"engine_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}: its parser is not asked")
    return module


def engine_function(name: str, function: str):
    """One function or method of a file of an engine, alone, without its decorators and annotations."""
    for node in ast.walk(ast.parse(engine_file(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            node.decorator_list, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
            names: dict = {"bisect_left": bisect.bisect_left, "bisect_right": bisect.bisect_right}
            exec(compile(ast.Module([node], []), name, "exec"), names)
            return names[function]
    return None


def test_vllm_itself_reads_the_schedule(answer, subject, monkeypatch):
    theirs = engine_module("vllm/v1/spec_decode/dynamic/utils.py", monkeypatch)
    config = json.loads(export("vllm", answer, subject)[0].text)
    dense = theirs.build_dynamic_sd_schedule_lookup(
        config["num_speculative_tokens_per_batch_size"], 64, config["num_speculative_tokens"]
    )
    assert list(dense)[1:] == wanted(answer["contexts"][0]["schedule"])
    for schedule in (HAND_SET, [[1, 4, 3], [9, 64, 0]], [[1, 2, 9]]):
        config = {"num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": schedule}
        dense = theirs.build_dynamic_sd_schedule_lookup(schedule, 600, 5)
        assert list(dense)[1:] == vllm_draft_lengths(config, 600), "our account of their rules"
    for refused in ([], [[2, 4, 3]], [[1, 4, 3], [4, 8, 2]], [[1, 4, -1]], [[3, 1, 2]]):
        with pytest.raises(ValueError):
            theirs.build_dynamic_sd_schedule_lookup(refused, 64, 5)


@pytest.mark.parametrize("method", VLLM_METHODS)
def test_vllm_knows_every_key_and_method(method, answer, subject):
    """Its configuration forbids unknown keys: all that are written are fields, and the method is one of its own."""
    tree = ast.parse(engine_file("vllm/config/speculative.py").read_text(encoding="utf-8"))
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SpeculativeConfig"]
    fields = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    literals = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}

    def methods(node) -> set[str]:
        found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
        return found.union(
            *(methods(literals[n.id]) for n in ast.walk(node) if isinstance(n, ast.Name) if n.id in literals)
        )

    for made in export("vllm", answer, subject | {"method": method}):
        written = json.loads(made.text)
        assert set(written) <= fields
        assert written["method"] in methods(literals["SpeculativeMethod"])


def test_sglang_itself_reads_the_slots(answer, subject, tmp_path, monkeypatch):
    theirs = engine_module("sglang/srt/speculative/adaptive_spec_params.py", monkeypatch)
    path, schedule = tmp_path / "adaptive.json", answer["contexts"][0]["schedule"]
    path.write_text(export("sglang", answer, subject)[0].text)
    config = json.loads(path.read_text())
    found = theirs.AdaptiveSpeculativeParams(4, str(path))
    assert found.candidate_steps == sorted({0} | {k for *_, k in schedule})
    for first, last, k in schedule:  # each slot settles on its draft length, and on 0 below break-even
        for accepted, settled in ((8.0, k), (0.0, 0)):
            for _ in range(200):
                found.on_verify_complete([accepted], last)
                now = found.get_steps_for_batch(first)
                if now == settled:
                    break
            assert now == settled == sglang_steps(config, first, accepted, k) and found.get_steps_for_batch(last) == now


def test_sglang_and_we_follow_the_same_rule(tmp_path, monkeypatch):
    """One slot of SGLang, fed the same accepted drafts until its average is steady, and our account of its rule."""
    theirs = engine_module("sglang/srt/speculative/adaptive_spec_params.py", monkeypatch)
    for candidates in ([1, 3, 5, 7], [0, 1, 3], [0, 3], [2]):
        entry = {"candidate_steps": candidates, "up_hysteresis": 0.0, "down_hysteresis": -0.25, "ceiling_coeff": 0}
        for start in candidates:
            for accepted in (0.1, 0.8, 1.4, 2.2, 3.1, 4.6, 6.8):
                slot = theirs.AdaptiveStepSlot(start, entry | {"ema_alpha": 1.0, "update_interval": 1})
                slot.warmup_batches = 0
                slot.update([accepted])
                assert slot.current_steps == sglang_steps({"1": entry}, 4, accepted, start), (
                    candidates,
                    start,
                    accepted,
                )


def test_sglang_itself_reads_the_step_costs(answer, subject, tmp_path, monkeypatch):
    theirs = engine_module("sglang/srt/speculative/dspark_components/dspark_sps.py", monkeypatch)
    for made in export("sglang-dspark", answer, subject):
        (tmp_path / made.file).write_text(made.text)
        found = theirs.load_sps_table_from_path(str(tmp_path / made.file))
        table = json.loads(made.text)
        for requests, budget in ((1, 0), (3, 4), (17, 40), (64, 256), (500, 2000)):
            ours = dspark_step_time(table, requests, budget)
            if "bias_seconds" in table:
                assert found.step_time(num_reqs=requests, budget=budget) == pytest.approx(ours, rel=1e-12)
            else:
                assert 1.0 / found.lookup(requests + budget) == pytest.approx(ours, rel=1e-12)


def test_tensorrt_llm_itself_reads_the_schedule(subject):
    """Its validator takes what is written, and its look-up gives the schedule, whichever way round this release is."""
    look_up = engine_function("tensorrt_llm/_torch/speculative/utils.py", "get_draft_len_for_batch_size")
    upper = look_up is not None
    if look_up is None:
        method = engine_function("tensorrt_llm/_torch/speculative/drafter.py", "get_draft_len_for_batch_size")
        look_up = lambda table, batch, most: method(types.SimpleNamespace(draft_len_schedule=table), batch)  # noqa: E731
    check = engine_function("tensorrt_llm/llmapi/llm_args.py", "validate_draft_len_schedule_and_sort")
    for schedule in ([[1, 8, 3], [9, 20, 2], [21, 64, 0]], [[1, 64, 4]], [[1, 1, 5], [2, 64, 1]]):
        (made,) = export("tensorrt-llm", made_up(schedule), subject, "1.4" if upper else "1.2")
        longest = schedule[0][2]
        lines = made.text.splitlines()
        table = dict(map(int, line.split(":")) for line in lines[lines.index("  draft_len_schedule:") + 1 :])
        table = check(None, table, types.SimpleNamespace(data={"max_draft_len": longest}))
        assert [look_up(table, batch, longest) for batch in range(1, 65)] == wanted(schedule)
