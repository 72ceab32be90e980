"""`diffspec acceptance`: estimates and intervals against simulated drafters, the bootstrap, and hand counts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from diffspec.acceptance import PositionAcceptance
from diffspec.analysis.acceptance_by_position import estimate, estimates, study
from diffspec.cli import main
from diffspec.results import InputError
from diffspec.traces.acceptance_counts import AcceptanceCounts, acceptance_counts
from diffspec.traces.gather import gather
from diffspec.traces.readers import speculation_profile

FALLING = (0.9, 0.8, 0.7, 0.6)


def walk(random, rates, steps):
    """Accepted drafts in each of `steps` steps of a drafter with these conditional rates."""
    draws = random.random((steps, len(rates))) < np.asarray(rates)
    return np.cumprod(draws, axis=1).sum(axis=1).astype(int)


def response(random, rates, steps=40, task=None, temperature=None) -> dict:
    """One response of vLLM with per-request metrics in detail."""
    accepted = walk(random, rates, steps)
    k = len(rates)
    speculation = {
        "mean_acceptance_length": 1 + float(accepted.mean()),
        "draft_acceptance_rate": float(accepted.mean() / k),
        "acceptance_histogram": np.bincount(accepted, minlength=k + 1).tolist(),
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": int(accepted.sum()),
        "num_draft_tokens": steps * k,
        "num_spec_tokens": k,
        "per_step_accepted": accepted.tolist(),
        "per_step_drafted": [k] * steps,
    }
    record = {
        "id": f"r{random.integers(1 << 40)}",
        "object": "text_completion",
        "choices": [{"index": 0, "text": "x", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 1 + steps + int(accepted.sum())},
        "metrics": {"time_to_first_token_ms": 10.0, "speculative_decoding": speculation},
    }
    return record | ({"task": task} if task else {}) | ({"temperature": temperature} if temperature is not None else {})


def write_requests(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def counts_of(random, requests, steps, spread):
    """Counts of requests whose rates differ: each request's rates are moved by a normal draw in the logit."""
    accepted, reached = np.zeros((requests, 4)), np.zeros((requests, 4))
    for index in range(requests):
        logit = np.log(np.asarray(FALLING) / (1 - np.asarray(FALLING))) + spread * random.normal()
        took = walk(random, 1 / (1 + np.exp(-logit)), steps)
        accepted[index] = [(took > i).sum() for i in range(4)]
        reached[index] = [(took >= i).sum() for i in range(4)]
    return AcceptanceCounts(accepted, reached, {}, "request")


def test_intervals_cover_when_requests_differ():
    random = np.random.default_rng(5)
    population = estimate(counts_of(random, 20_000, 40, 0.7))
    covered = np.zeros(4)
    naive = 0
    for _ in range(300):
        found = estimate(counts_of(random, 60, 40, 0.7))
        assert not found.independent_steps
        for i, (entry, true) in enumerate(zip(found.positions, population.positions, strict=True)):
            covered[i] += entry.low <= true.acceptance <= entry.high
            half = 1.96 * np.sqrt(entry.acceptance * (1 - entry.acceptance) / entry.reached)
            naive += i == 0 and abs(entry.acceptance - true.acceptance) <= half
    assert (covered / 300 >= 0.90).all() and (covered / 300 <= 0.99).all()
    assert naive / 300 < 0.85  # steps taken to be independent would promise too much


def test_the_interval_is_that_of_a_bootstrap_over_requests():
    random = np.random.default_rng(6)
    counts = counts_of(random, 200, 30, 0.5)
    found = estimate(counts)
    draws = random.integers(0, 200, (4000, 200))
    rates = counts.accepted[draws].sum(axis=1) / counts.reached[draws].sum(axis=1)
    low, high = np.percentile(rates, [2.5, 97.5], axis=0)
    for i, entry in enumerate(found.positions):
        assert entry.high - entry.low == pytest.approx(high[i] - low[i], rel=0.12)
        assert entry.acceptance == pytest.approx(rates[:, i].mean(), abs=2e-3)


@pytest.mark.parametrize(
    ("rates", "verdict"), [(FALLING, "falls"), ((0.8, 0.8, 0.8, 0.8), "level"), ((0.5, 0.6, 0.7, 0.8), "rises")]
)
def test_the_verdict_tells_the_trend(rates, verdict):
    random = np.random.default_rng(7)
    took = [walk(random, rates, 60) for _ in range(400)]
    accepted = np.array([[(t > i).sum() for i in range(4)] for t in took], float)
    reached = np.array([[(t >= i).sum() for i in range(4)] for t in took], float)
    found = estimate(AcceptanceCounts(accepted, reached, {}, "request"))
    assert found.verdict == verdict
    assert found.conditional == pytest.approx(rates, abs=0.03)
    assert found.tokens_per_step == pytest.approx(1 + np.cumprod(rates).sum(), rel=0.02)
    few = estimate(AcceptanceCounts(accepted[:1], reached[:1], {}, "request"))
    assert few.independent_steps and few.verdict in (verdict, "cannot tell")


def test_one_request_or_one_step_decides_nothing():
    """A position that one request reached once, and a rate of one, keep an interval of honest width."""
    random = np.random.default_rng(11)
    reached, accepted = np.zeros((25, 4)), np.zeros((25, 4))
    reached[:, 0], accepted[:, 0] = 40, random.binomial(40, 0.4, 25)
    reached[0, 1:], accepted[0, 1:] = 1, 1
    found = estimate(AcceptanceCounts(accepted, reached, {}, "request"))
    assert found.positions[3].low < 0.3 and found.positions[3].high == 1.0
    assert found.verdict == "cannot tell"
    sure = estimate(AcceptanceCounts(np.full((30, 2), 4.0), np.full((30, 2), 4.0), {}, "request"))
    assert sure.positions[0].acceptance == 1.0 and 0.9 < sure.positions[0].low < 0.99


def test_groups_by_task_and_output_position(tmp_path):
    random = np.random.default_rng(8)
    records = [response(random, (0.9, 0.8), task="code") for _ in range(60)]
    records += [response(random, (0.6, 0.5), task="chat") for _ in range(60)]
    gathered = gather([write_requests(tmp_path / "requests.jsonl", records)])
    whole, code, chat = estimates(acceptance_counts(gathered), ["task"])
    assert (whole.units, code.units, chat.units) == (120, 60, 60)
    assert code.group == {"task": "code"} and code.conditional == pytest.approx((0.9, 0.8), abs=0.03)
    assert chat.conditional == pytest.approx((0.6, 0.5), abs=0.05)
    answer, curve = study(gathered, ["output_position"])
    places = [group["group"]["output_position"] for group in answer["groups"][1:]]
    assert set(places) <= {"0-15", "16-63", "64-255", "256-1023", "1024+"} and len(places) >= 2
    reached = sum(group["positions"][0]["reached"] for group in answer["groups"][1:])
    assert reached == 120 * 40  # every step once
    assert speculation_profile.from_record(json.loads(curve)).conditional == pytest.approx(whole.conditional)
    with pytest.raises(InputError, match="no request says its workload"):
        estimates(acceptance_counts(gathered), ["workload"])
    with pytest.raises(InputError, match="allowed: deployment"):
        estimates(acceptance_counts(gathered), ["colour"])


def test_a_benchmark_row_gives_its_counts():
    gathered = gather(["data/vllm_cpu_quiet.csv"])
    found = acceptance_counts(gathered)
    assert [counts.unit for counts in found] == ["run"]
    whole = estimates(found, ["draft_length"])
    two, four = whole[1:]
    assert two.group == {"draft_length": "2"} and two.conditional == pytest.approx((0.6, 0.6), abs=0.03)
    assert four.conditional == pytest.approx((0.9,) * 4, abs=0.03)


def test_from_the_command_line_to_a_prediction(tmp_path, capsys):
    random = np.random.default_rng(9)
    requests = write_requests(tmp_path / "requests.jsonl", [response(random, FALLING) for _ in range(200)])
    curve = tmp_path / "curve.json"
    arguments = ["acceptance", str(requests), "--out", str(curve), "--plot", str(tmp_path / "a.png"), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["groups"][0]["verdict"] == "falls" and (tmp_path / "a.png").stat().st_size > 5000
    assert main(["acceptance", str(requests)]) == 0
    assert "acceptance falls along the draft" in capsys.readouterr().out
    # the profile read again says the same, without intervals
    assert main(["acceptance", str(curve), "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert profile["conditional"] == pytest.approx([entry["acceptance"] for entry in answer["groups"][0]["positions"]])
    expected = float(PositionAcceptance(jnp.array(profile["conditional"])).tokens_per_step(3.0))
    model = tmp_path / "model.json"
    assert (
        main(["fit", "data/vllm_cpu_quiet.csv", "--step-time", "affine", "--no-plot", "--out", str(model), "--json"])
        == 0
    )
    capsys.readouterr()
    asked = ["predict", str(model), "--arrival-rate", "2", "--draft-length", "3", "--acceptance", str(curve), "--json"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_step"] == pytest.approx(expected)
    assert main([*asked[:-3], "--acceptance", str(requests), "--json"]) == 2
    assert "no speculation profile" in capsys.readouterr().err


def test_nothing_that_tells(tmp_path, capsys):
    plain = tmp_path / "plain.csv"
    plain.write_text("arrival_rate,prompt_length,output_length,e2e_mean\n1,64,64,1.5\n")
    assert main(["acceptance", str(plain)]) == 2
    assert "nothing here tells acceptance by draft position" in capsys.readouterr().err
