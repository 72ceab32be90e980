"""Updating: the filter is recursive least squares where it must be, follows a changed server, and tells of it."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import assert_close
from test_cli_main import run, toy_deployment, toy_model
from test_fit import SERVER, reference_rows, trace_of

from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.drift import Watch, threshold
from diffspec.fitting.evaluate import evaluate
from diffspec.fitting.fit import fit
from diffspec.fitting.kalman import State, correct, forget
from diffspec.fitting.online_acceptance import KEY
from diffspec.fitting.update import update
from diffspec.results import InputError

NORMAL = 1e12
SLOW = dataclasses.replace(SERVER, weight_read=0.0078, token_compute=5.2e-5, kv_read=7.8e-8)
"""The same server with a verification that costs 30 % more."""


# --- the filter ----------------------------------------------------------------------


def linear_problem(seed: int = 0, rows: int = 30, size: int = 4):
    """Rows of y = A x + noise, two observables each."""
    random = np.random.default_rng(seed)
    matrices = random.normal(size=(rows, 2, size))
    truth = random.normal(size=size)
    scales = random.uniform(0.1, 0.5, size=(rows, 2))
    values = matrices @ truth + scales * random.normal(size=(rows, 2))
    return matrices, values, scales


def filtered(state, matrices, values, scales, **options):
    for matrix, value, scale in zip(matrices, values, scales, strict=True):
        state, _ = correct(state, lambda x, a=matrix: (a @ x, a), value, scale, NORMAL, **options)
    return state


def test_a_linear_update_is_the_batch_fit():
    matrices, values, scales = linear_problem()
    size = matrices.shape[-1]
    start = State(np.zeros(size), np.eye(size), np.zeros((0, size)))
    state = filtered(start, matrices, values, scales)
    precision = np.eye(size) + np.einsum("rmi,rm,rmj->ij", matrices, scales**-2, matrices)
    batch = np.linalg.solve(precision, np.einsum("rmi,rm,rm->i", matrices, scales**-2, values))
    assert_close(state.mean, batch, rtol=1e-9)
    assert_close(state.covariance, np.linalg.inv(precision), rtol=1e-8, atol=1e-12)
    backwards = filtered(start, matrices[::-1], values[::-1], scales[::-1])
    assert_close(backwards.mean, state.mean, rtol=1e-9)


def test_draws_follow_as_an_ensemble():
    matrices, values, scales = linear_problem(1)
    size = matrices.shape[-1]
    draws = np.random.default_rng(2).standard_normal((4000, size))
    random = np.random.default_rng(3)
    state = filtered(State(np.zeros(size), np.eye(size), draws), matrices, values, scales, random=random)
    deviation = np.sqrt(np.diag(state.covariance))
    sizes = np.outer(deviation, deviation)
    assert_close(np.cov(state.draws.T) / sizes, state.covariance / sizes, rtol=0, atol=0.06)
    wide = filtered(State(np.zeros(size), np.eye(size), draws), matrices, values, scales, draw_scale=2.0, random=random)
    assert 1.8 < np.median(wide.draws.std(axis=0) / deviation) < 2.1


def test_forgetting_is_exponentially_weighted_least_squares():
    """One coordinate without a binding prior: weights factor^(age) on the rows and the prior."""
    factor, values = 0.9, np.random.default_rng(4).normal(1.0, 0.1, size=12)
    state = State(np.zeros(1), np.array([[1e-2]]), np.zeros((0, 1)))
    one = np.ones((1, 1))
    for value in values:
        state, _ = correct(state, lambda x: (x, one), np.array([value]), np.array([0.1]), NORMAL, forgetting=factor)
    ages = factor ** np.arange(len(values))[::-1]
    precision = 1e2 * factor ** len(values) + 1e2 * ages.sum()
    assert_close(state.covariance[0, 0], 1.0 / precision, rtol=1e-9)
    assert_close(state.mean[0], 1e2 * np.sum(ages * values) / precision, rtol=1e-9)


def test_forgetting_spares_what_is_not_measured_and_stops_at_the_prior():
    covariance = np.array([[0.4, 0.1], [0.1, 0.3]])
    draws = np.random.default_rng(5).multivariate_normal(np.zeros(2), covariance, 5)
    row = np.array([[1.0, -0.5]])
    state = State(np.zeros(2), covariance, draws)
    faded = forget(state, row, 0.8)
    assert_close(row @ faded.covariance @ row.T, row @ covariance @ row.T / 0.8, rtol=1e-12)
    assert_close(faded.draws @ row.T, draws @ row.T / np.sqrt(0.8), rtol=1e-12)
    beside = np.array([[1.0, 0.0]]) - row * (covariance @ row.T)[0] / (row @ covariance @ row.T)  # uncorrelated with it
    assert_close(beside @ faded.covariance @ beside.T, beside @ covariance @ beside.T, rtol=1e-12)
    for _ in range(100):
        faded = forget(faded, row, 0.8)
    assert np.linalg.eigvalsh(faded.covariance)[-1] <= 1.0 + 1e-9


def test_one_strange_row_is_hardly_believed():
    state = State(np.zeros(1), np.array([[0.01]]), np.zeros((0, 1)))
    one = np.ones((1, 1))
    near, _ = correct(state, lambda x: (x, one), np.array([0.1]), np.array([0.1]), 4.0)
    far, _ = correct(state, lambda x: (x, one), np.array([5.0]), np.array([0.1]), 4.0)
    assert 0.0 < far.mean[0] < near.mean[0] and far.covariance[0, 0] > near.covariance[0, 0]


def test_sums_ring_falsely_as_often_as_stated():
    """Four sums of standard normal scores: the mean number of rows to the first alarm, by simulation."""
    random = np.random.default_rng(6)
    limit, lanes = threshold(4), 400
    sums, age, alive = np.zeros((lanes, 4)), np.zeros(lanes), np.ones(lanes, dtype=bool)
    while alive.any():
        scores = np.clip(random.standard_normal((lanes, 2)), -3.0, 3.0)
        sums = np.maximum(0.0, sums + np.concatenate([scores, -scores], axis=1) - 1.0)
        age += alive
        alive &= ~(sums > limit).any(axis=1)
    assert 800 < age.mean() < 1300  # 1,000 by Siegmund's approximation; the standard error is 5 %


def test_a_watch_learns_its_scale_and_dates_a_change():
    random, watch = np.random.default_rng(7), Watch()
    for _ in range(200):
        watch.add(float(0.2 * random.standard_normal()), 0.0, 0.1, NORMAL)
    assert 1.4 < watch.learned < 2.1
    watch = Watch()
    for error in [0.0, 0.05, -0.05, 0.5, 0.6, 0.4]:
        watch.add(error, 0.0, 0.1, NORMAL)
    rows, size = watch.alarm(threshold(4)) or (0, 0.0)
    assert rows == 3 and size == pytest.approx(0.5)
    assert watch.again(threshold(4)).rows == 3
    assert Watch.from_dict(json.loads(json.dumps(watch.to_dict()))) == watch


# --- a fitted model ----------------------------------------------------------------------


def stream(servers, seed: int, noise: float = 0.03, alpha: float = 0.8):
    """Rows at random operating points of a server that is each of ``servers`` (server, rows) in turn."""
    random, rows = np.random.default_rng(seed), []
    for server, count in servers:
        for _ in range(count):
            point = (float(random.choice([1.0, 3.0, 6.0, 10.0])),), (int(random.choice([0, 2, 4, 6])),)
            (row,) = reference_rows(server, *point, alpha, 0.0)
            first, later = np.exp(noise * random.standard_normal(2))
            scaled = {"ttft_mean": first, "itl_mean": later, "tpot_mean": later}
            rows.append(row | {name: row[name] * factor for name, factor in scaled.items()})
    return rows


OLD = reference_rows(SERVER, (1.0, 3.0, 5.0, 7.0, 9.0, 12.0, 15.0, 18.0), (0, 2, 4, 6), 0.8, 0.03)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("update")


@pytest.fixture(scope="module")
def model(folder):
    fitted = fit(trace_of(OLD, folder / "old.csv"), step_time="roofline", uncertainty="laplace")
    deployment = fitted.deployment()
    known = deployment.uncertainty
    assert known is not None
    with_draws = dataclasses.replace(known, draws=known.deviations(64))
    (folder / "model.json").write_text(fitted.to_json(), encoding="utf-8")
    deployments = {deployment.name: dataclasses.replace(deployment, uncertainty=with_draws)}
    return dataclasses.replace(fitted, deployments=deployments)


@pytest.fixture(scope="module")
def unseen(folder):
    rows = [reference_rows(server, (2.0, 5.0, 8.0), (0, 3), 0.8, 0.0) for server in (SERVER, SLOW)]
    return [trace_of(part, folder / f"unseen{index}.csv") for index, part in enumerate(rows)]


def mape(model, trace, column="itl_mean"):
    return evaluate(model, trace)["metrics"][column]["mape"]


@pytest.mark.parametrize("seed", range(3))
def test_a_slower_server_is_followed_and_told(model, folder, unseen, seed):
    after, (told,) = update(model, trace_of(stream([(SERVER, 5), (SLOW, 15)], seed), folder / "slow.csv"))
    assert mape(model, unseen[1]) > 0.15 and mape(after, unseen[1]) < 0.05
    assert {change["what"] for change in told["drift"]} <= {"itl_mean", "ttft_mean"}
    change = next(change for change in told["drift"] if change["what"] == "itl_mean")
    assert 0.1 < change["change"] < 0.35  # 30 % of verification is 18 to 25 % of a step
    assert change["since"].endswith(("slow.csv row 6", "slow.csv row 7", "slow.csv row 8")), change  # the sixth: line 7
    assert told["observables"]["itl_mean"]["after"] < told["observables"]["itl_mean"]["before"]
    assert any("itl_mean is" in warning for warning in after.deployment().warnings)
    known, before = after.deployment().uncertainty, model.deployment().uncertainty
    assert np.linalg.eigvalsh(known.covariance / np.outer(known.prior, known.prior))[-1] < 1.0 + 1e-6
    assert known.draws.shape == before.draws.shape
    ratio = known.draws.std(axis=0) / np.sqrt(np.diag(known.covariance))
    assert 0.6 < np.median(ratio) < 1.5


def test_an_unchanged_server_is_not_flagged(model, folder, unseen):
    """Eight streams of 40 rows: at one false alarm in 1,000 rows 0.3 are expected, and three have a chance of 1 in
    300."""
    flagged = 0
    for seed in range(8):
        after, (told,) = update(model, trace_of(stream([(SERVER, 40)], 100 + seed), folder / "same.csv"))
        flagged += len(told["drift"])
        assert mape(after, unseen[0]) < 0.03
    assert flagged < 3


def test_rows_at_once_or_in_turn_forwards_or_backwards(model, folder, unseen):
    rows = stream([(SERVER, 24)], 11)
    whole, _ = update(model, trace_of(rows, folder / "whole.csv"))
    half, _ = update(model, trace_of(rows[:12], folder / "first.csv"))
    half = FittedModel.from_json(half.to_json())  # as it is kept between the two
    halves, (told,) = update(half, trace_of(rows[12:], folder / "second.csv"))
    back, _ = update(model, trace_of(rows[::-1], folder / "back.csv"))
    assert told["rows"] == 12 and halves.deployment().quality[KEY]["rows"] == 24
    first = predicted(whole, unseen[0])
    assert_close(predicted(halves, unseen[0]), first, rtol=0.005)
    assert_close(predicted(back, unseen[0]), first, rtol=0.02)


def predicted(model, trace):
    from diffspec.fitting.evaluate import predict_trace

    found = predict_trace(model.deployment(), trace.frame, with_intervals=False).predicted
    return np.concatenate([found["ttft_mean"], found["itl_mean"]])


@pytest.mark.slow
def test_an_update_without_forgetting_is_near_the_fit_of_all_rows(model, folder, unseen):
    new = stream([(SERVER, 30)], 12)
    updated, _ = update(model, trace_of(new, folder / "new.csv"), forgetting=1.0)
    everything = fit(trace_of(OLD + new, folder / "all.csv"), step_time="roofline", uncertainty="laplace")
    apart = np.abs(np.log(predicted(updated, unseen[0]) / predicted(everything, unseen[0])))
    assert apart.max() < 0.03 and apart.mean() < 0.015, apart  # the noise is 3 %; a fit of all rows finds another
    assert max(mape(updated, unseen[0]), mape(everything, unseen[0])) < 0.03


def test_acceptance_is_a_weighted_mean_and_its_change_is_told(model, folder):
    rows = [row | {"n_requests": 200} for row in stream([(SERVER, 12)], 13) if row["draft_length"] == 4]
    known = model.deployment()
    index = known.acceptance.draft_lengths.index(4)
    weight = 100.0 * len(OLD) / 4
    same = trace_of([row | {"acceptance_rate": 0.82} for row in rows], folder / "acc.csv")
    after, (told,) = update(model, same, forgetting=1.0)
    expected = (weight * 0.8 + 200 * len(rows) * 0.82) / (weight + 200 * len(rows))
    assert_close(after.deployment().acceptance.curves[index][:4], expected, rtol=1e-9)
    assert told["drift"] == [] and told["acceptance"]["4"]["requests"] == weight + 200 * len(rows)
    dropped = [row | {"acceptance_rate": 0.6 if number >= 2 else 0.8} for number, row in enumerate(4 * rows)]
    after, (told,) = update(model, trace_of(dropped, folder / "acc.csv"))
    (change,) = [entry for entry in told["drift"] if entry["what"].startswith("tokens")]
    assert change["since"].endswith("acc.csv row 4") and change["change"] < -0.2
    assert "tokens per step at draft length 4 is" in change["text"] and "lower" in change["text"]
    assert_close(after.deployment().acceptance.curves[index][:4], 0.6, rtol=1e-6)


def test_the_measured_ranges_and_the_hash_grow(model, folder):
    rows = reference_rows(SERVER, (0.5, 2.0), (1,), 0.8, 0.0)
    after, _ = update(model, trace_of(rows, folder / "grown.csv"))
    measured = after.deployment().measured
    assert measured["arrival_rate"] == [0.5, 18.0] and measured["draft_lengths"] == [0, 1, 2, 4, 6]
    assert after.deployment().acceptance.draft_lengths == (1, 2, 4, 6)
    assert after.rows_sha256 != model.rows_sha256
    assert FittedModel.from_json(after.to_json()).to_json() == after.to_json()


def named(model, **changes):
    return dataclasses.replace(model, deployments={"reference": dataclasses.replace(model.deployment(), **changes)})


def test_rows_of_others_are_refused(model, folder):
    rows = reference_rows(SERVER, (2.0,), (0,), 0.8, 0.0)
    other = trace_of([row | {"deployment": "another"} for row in rows], folder / "other.csv")
    with pytest.raises(InputError, match=r"got new rows of 'another'; allowed: 'reference'; fit it on its own"):
        update(model, other)
    moved = trace_of([row | {"hardware": "h200"} for row in rows], folder / "moved.csv")
    on_h100 = named(model, defaults=model.deployment().defaults | {"hardware": "h100"})
    with pytest.raises(InputError, match=r"hardware: got 'h200' in the new rows; allowed: 'h100'"):
        update(on_h100, moved)
    with pytest.raises(InputError, match="does not tell how sure it is"):
        update(named(model, uncertainty=None), trace_of(rows, folder / "rows.csv"))
    with pytest.raises(InputError, match=r"forgetting: got 1.2; allowed: 0.5 to 1"):
        update(model, trace_of(rows, folder / "rows.csv"), forgetting=1.2)


# --- the command line ----------------------------------------------------------------------


def test_fit_update_writes_a_model_and_tells(model, folder, tmp_path):
    trace_of(stream([(SLOW, 8)], 20), tmp_path / "new.csv")
    out = tmp_path / "model2.json"
    ran = run("fit", "--update", folder / "model.json", tmp_path / "new.csv", "--out", out, "--no-plot", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    (told,) = answer["update"]
    assert told["rows"] == 8 and told["forgetting"] == 0.98 and told["drift"]
    assert FittedModel.from_json(out.read_text(encoding="utf-8")).rows_sha256 == answer["rows_sha256"]
    assert run("predict", out, "--arrival-rate", "3", "--draft-length", "4").code == 0
    ran = run("fit", "--update", folder / "model.json", tmp_path / "new.csv", "--out", out, "--no-plot")
    assert ran.code == 0, ran.err
    assert all(word in ran.out for word in ("8 new rows", "one row ahead", "moved most", "changed: itl_mean is"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--update", "MODEL", "--holdout", "draft_length==2"), "--update goes with --forgetting"),
        (("--update", "MODEL", "--pool", "all"), "--update goes with --forgetting"),
        (("--forgetting", "0.9"), "--forgetting needs --update"),
        (("--update", "MODEL"), "got new rows of 'reference'; allowed: 'toy'"),
    ],
)
def test_fit_update_refuses(options, told, tmp_path):
    path = toy_model(tmp_path / "toy.json", toy_deployment())
    trace_of(reference_rows(SERVER, (2.0,), (0,), 0.8, 0.0), tmp_path / "new.csv")
    options = [path if option == "MODEL" else option for option in options]
    ran = run("fit", tmp_path / "new.csv", "--out", tmp_path / "m.json", *options)
    assert ran.code == 2 and told in ran.err, ran.err
