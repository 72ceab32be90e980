"""The next runs: exchange against brute force, gradients against differences, expectations against refits, files."""

import itertools
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import assert_close, finite_difference
from scipy.optimize import least_squares
from test_cli_commands import documented_keys
from test_cli_main import run, toy_deployment, toy_model
from test_fit import SERVER, reference_rows, trace_of

from diffspec.analysis import optimal_design
from diffspec.analysis.design import CRITERIA, design
from diffspec.analysis.design_files import plan_files, sweep_files
from diffspec.analysis.runs import Knowledge, Run, alike
from diffspec.collecting.plan_text import read_plan
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.objective import build_objective, choose_targets
from diffspec.fitting.observations import acceptance_curve, observations
from diffspec.fitting.solve import minimise, random_starts
from diffspec.fitting.uncertainty import Uncertainty, laplace
from diffspec.programs import FAST_COMPILE
from diffspec.results import InputError


def unsure(deployment=None, share: float = 0.3, inflation: float = 1.0):
    """A toy deployment that knows its parameters to a share of their priors."""
    form = build_form("affine", Scales(0.02, 0.08, 96.0, 64.0))
    prior = np.asarray(form.spread)
    columns = ("ttft_mean", "itl_mean")
    known = Uncertainty(
        method="laplace",
        paths=form.paths,
        covariance=np.diag((share * prior) ** 2),
        prior=prior,
        misfit=dict.fromkeys(columns, 0.03),
        request_spread=dict.fromkeys(columns, 0.2),
        degrees_of_freedom=4.0,
        inflation=dict.fromkeys(columns, inflation),
    )
    return replace(deployment or toy_deployment(), uncertainty=known)


# --- the linear design ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2, 3, 4])
@pytest.mark.parametrize("kind", ["parameters", "predictions", "one question"])
def test_exchange_finds_what_brute_force_finds(budget, kind):
    x = np.linspace(-1.0, 1.0, 11)
    rows = np.stack([np.ones_like(x), x, x**2], axis=1)
    informations = np.einsum("np,nq->npq", rows, rows) / 0.1**2
    questions = {"parameters": None, "predictions": rows.T @ rows / len(x), "one question": np.outer(rows[8], rows[8])}
    precision = np.diag([1.0, 1.0, 4.0])
    found = optimal_design.choose(precision, informations, budget, questions[kind])
    sets = [list(some) for some in itertools.combinations(range(len(x)), budget)]
    values = [optimal_design.criterion(precision + informations[some].sum(0), questions[kind]) for some in sets]
    best = optimal_design.criterion(precision + informations[found].sum(0), questions[kind])
    assert len(set(found)) == budget
    assert_close(best, min(values), rtol=1e-9)


def test_alike_candidates_are_never_chosen_together():
    informations = np.stack([np.diag([4.0, 0.0]), np.diag([3.9, 0.0]), np.diag([0.0, 1.0])])
    near = np.asarray([[True, True, False], [True, True, False], [False, False, True]])
    assert sorted(optimal_design.choose(np.eye(2), informations, 3, np.eye(2), near)) == [0, 2]
    assert optimal_design.choose(np.eye(2), informations, 2, None)[0] == 0


def test_the_order_puts_the_most_telling_first_and_ends_with_all():
    informations = np.stack([np.diag([1.0, 0.0]), np.diag([0.0, 9.0]), np.diag([3.0, 3.0])])
    order, values = optimal_design.in_order(np.eye(2), informations, np.eye(2))
    assert order[0] == 2 and sorted(order) == [0, 1, 2]
    assert values == sorted(values, reverse=True)
    assert_close(values[-1], np.trace(np.linalg.inv(np.eye(2) + informations.sum(0))), rtol=1e-12)


# --- the model's side -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["arrival_rate", "concurrency"])
@pytest.mark.parametrize("kind", ["predictions", "parameters"])
def test_the_gradient_of_the_criterion_is_that_of_finite_differences(loop, kind):
    knowledge = Knowledge(unsure(), None, 200)
    x = Run(loop, 3.0, 2, 120.0, 90.0).x
    size = len(knowledge.paths)
    draws = np.random.default_rng(1).normal(size=(40, size))
    questions = None if kind == "parameters" else draws.T @ draws / 40

    def after(points):
        runs = [Run(loop, *np.exp(point[:1]), 2, *np.exp(point[1:])) for point in points]
        whole = knowledge.precision + knowledge.informations(knowledge.ask(runs))
        return optimal_design.criterion(whole, questions)

    value, slope = knowledge.slope(loop, x, knowledge.precision, questions)
    assert_close(value, after(x[None, :3])[0], rtol=1e-10)
    assert_close(slope, finite_difference(after, x[:3], 1e-3), rtol=1e-5, atol=1e-8 * abs(value))


def test_inflation_widens_what_the_rows_told_and_not_what_the_priors_hold():
    sure, less = (Knowledge(unsure(share=0.3, inflation=f), None, 200) for f in (1.0, 2.0))
    prior = np.diag(sure.uncertainty.prior**-2.0)
    assert_close(sure.precision, np.linalg.inv(sure.uncertainty.covariance), rtol=1e-9, atol=1e-12)
    assert_close(less.precision - prior, (sure.precision - prior) / 4.0, rtol=1e-9, atol=1e-12)
    assert_close(less.weights, sure.weights / 4.0, rtol=1e-12)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Eight rows of the reference server fitted, as a deployment; rows of four further runs; the way to objectives."""
    folder = tmp_path_factory.mktemp("design")
    steady = {"n_requests": 200, "window": "steady"}
    rows = [row | steady for row in reference_rows(SERVER, (1.0, 4.0, 8.0, 12.0), (0, 4), 0.8, 0.03)]
    more = [row | steady for row in reference_rows(SERVER, (2.0, 14.0), (0, 2), 0.8, 0.0)]
    form = build_form("roofline", Scales(0.01, 0.04, 360.0, 300.0))
    form = replace(form, template=replace(form.template, waiting_states=0, finite_runs="trapezoid"))

    def objective_of(some):
        frame = trace_of(some, folder / "rows.csv").frame
        data = observations(frame)
        return build_objective(form, data, choose_targets(data)), data, acceptance_curve(frame)

    objective, data, curve = objective_of(rows)
    weights = np.ones((2, len(data)))
    solution = minimise(objective, random_starts(objective.size)[:2], np.tile(weights, (2, 1, 1)))
    vector = solution.vector[solution.best]
    deployment = FittedDeployment(
        name="reference",
        form="roofline",
        serving=form.model(jnp.asarray(vector[: len(form.paths)])),
        acceptance=curve,
        defaults={},
        measured={"draft_lengths": [0, 4]},
        quality={"rows": 8},
        uncertainty=laplace(objective, solution, weights, data.cells, {}),
    )
    return deployment, vector, rows, more, objective_of


def test_a_run_adds_the_information_that_a_fit_counts(problem):
    deployment, vector, _, more, objective_of = problem
    objective, data, _ = objective_of(more)
    weights = np.ones((2, len(data)))
    found = minimise(objective, [vector], [weights], max_iterations=0)
    spread = np.asarray(objective.form.spread)
    size = len(spread)
    told = objective.fisher_information(vector, weights, found.jacobian[0])[:size, :size] / np.outer(spread, spread)
    knowledge = Knowledge(deployment, None, 200)
    expected = knowledge.informations(knowledge.ask([_run(row) for row in more])).sum(axis=0)
    assert_close(expected, told, rtol=1e-6, atol=1e-9 * np.abs(told).max())


def test_refits_with_the_planned_runs_scatter_as_expected(problem):
    """Refits by scipy to scattered measurements of the old and the planned runs, and scattered priors: the spread of
    what they predict is what a design expects of the planned runs."""
    deployment, _, rows, more, _ = problem
    knowledge = Knowledge(deployment, None, 200)
    prior = knowledge.uncertainty.prior
    old, new = ([_run(row) for row in some] for some in (rows, more))
    told = np.diag(prior**-2.0) + knowledge.informations(knowledge.ask(old)).sum(axis=0)
    after = np.linalg.inv(told + knowledge.informations(knowledge.ask(new)).sum(axis=0))
    asked = [Run("arrival_rate", rate, k, 300.0, 120.0) for rate in (3.0, 10.0, 16.0) for k in (0, 2, 4)]
    gradients = knowledge.ask(asked).jacobian[:, :2].reshape(-1, len(prior))
    expected, without = (
        np.sqrt(np.mean(np.einsum("np,pq,nq->n", gradients, part, gradients))) for part in (after, np.linalg.inv(told))
    )

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def logs(server, points, shift):
        return _both(partial(server.logs, "arrival_rate"), points, shift)

    points = np.stack([run.x for run in [*old, *new, *asked]])
    centre, _ = logs(knowledge.server, points, np.zeros(len(prior)))
    measured, scale = len(old) + len(new), np.sqrt(knowledge.weights[:2])
    random, found = np.random.default_rng(0), []
    for _ in range(60):
        scattered = random.normal(size=(measured, 2)) / scale
        middle = prior * random.normal(size=len(prior))

        def residuals(shift, scattered=scattered, middle=middle):
            values, _ = logs(knowledge.server, points, shift)
            gap = scale * (values[:measured] - centre[:measured] - scattered)
            return np.concatenate([np.ravel(gap), (shift - middle) / prior])

        def slopes(shift):
            _, jacobian = logs(knowledge.server, points, shift)
            scaled = np.asarray(jacobian[:measured]) * scale[:, None]
            return np.concatenate([scaled.reshape(-1, len(prior)), np.diag(1.0 / prior)])

        best = least_squares(residuals, np.zeros(len(prior)), slopes, ftol=1e-6)
        found.append(logs(knowledge.server, points, best.x)[0][measured:])
    simulated = np.sqrt(np.mean(np.var(np.asarray(found), axis=0)))
    assert expected < 0.9 * without
    assert_close(simulated, expected, rtol=0.15)


def _run(row):
    return Run("arrival_rate", row["arrival_rate"], row["draft_length"], row["prompt_length"], row["output_length"])


def _both(one, points, shift):
    """log ttft and log itl [points, 2] and their jacobian [points, 2, paths]."""
    values = jax.vmap(lambda x: one(x, shift)[0][:2])(points)
    return values, jax.vmap(jax.jacfwd(lambda moved, x: one(x, moved)[0][:2]), (None, 0))(shift, points)


# --- the answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_runs_keep_their_bounds_and_tell_what_they_gain(criterion):
    deployment = unsure(toy_deployment(prompt_length=[64.0, 512.0]))
    answer = design(deployment, 5, criterion=criterion, max_draft_length=6, max_rate=4.0, max_utilization=0.7)
    points = answer["points"]
    assert len(points) == 5 and answer["criterion"] == criterion
    runs = []
    for point in points:
        loop = "arrival_rate" if "arrival_rate" in point else "concurrency"
        assert 0 <= point["draft_length"] <= 6 and isinstance(point["draft_length"], int)
        assert 64 <= point["prompt_length"] <= 512 and point["output_length"] == 64
        if loop == "arrival_rate":
            assert 0.5 <= point[loop] <= 4.0 and point["utilization"] <= 0.7 * (1 + 1e-9)
            assert float(f"{point[loop]:.2g}") == point[loop]
        else:
            assert 1 <= point[loop] <= 16 and float(point[loop]).is_integer()
        runs.append(Run(loop, point[loop], point["draft_length"], point["prompt_length"], point["output_length"]))
        assert point["tells"]
    assert alike(runs, runs).sum() == len(runs)  # only each with itself
    afters = [answer["before"], *(point["after"] for point in points)]
    assert afters == sorted(afters, reverse=True) and answer["after"] == afters[-1]
    assert_close(sum(point["share"] for point in points), 1.0, rtol=1e-9)
    assert_close(answer["expected_gain"], 1.0 - answer["after"] / answer["before"], rtol=1e-12)
    for told in answer["expected"].values():
        assert told["after"] <= told["before"] * (1 + 1e-9)


def test_the_gradient_search_is_no_worse_than_the_grid_and_more_runs_no_worse_than_fewer():
    deployment = unsure(toy_deployment(prompt_length=[64.0, 2048.0], output_length=[16.0, 512.0]))
    answers = [design(deployment, budget) for budget in (1, 3)]
    assert answers[1]["after"] < answers[0]["after"] < answers[0]["before"]
    chosen = [{key: point[key] for key in point if key not in ("after", "share")} for point in answers[1]["points"]]
    same = design(deployment, 3, candidates=chosen)
    assert_close(same["after"], answers[1]["after"], rtol=1e-9)


def test_only_given_candidates_are_chosen_each_once():
    cells = [
        {"arrival_rate": rate, "draft_length": k, "prompt_length": 64, "output_length": 64}
        for rate in (1.0, 1.1, 400.0)
        for k in (0, 4)
    ]
    answer = design(unsure(), 9, candidates=cells)
    chosen = [(point["arrival_rate"], point["draft_length"]) for point in answer["points"]]
    assert sorted(chosen) == [(1.0, 0), (1.0, 4), (1.1, 0), (1.1, 4)]  # 400 req/s has no steady state
    assert any("only 4 runs" in warning for warning in answer["warnings"])


def test_new_draft_lengths_and_extrapolation_are_told():
    answer = design(unsure(), 8, asked={"draft_length": (3, 8), "arrival_rate": (8.0, 12.0)}, max_draft_length=8)
    told = " ".join(point["tells"] for point in answer["points"])
    assert "never measured" in told or "beyond the longest measured one" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "best"}, "criterion: got 'best'; allowed: predictions, parameters, decision"),
        ({"budget": 0}, r"budget: got 0; allowed: \[1, 1000\]"),
        ({"max_utilization": 1.5}, "max_utilization: got 1.5"),
        ({"asked": {"arrival_rate": (4.0, 1.0)}}, "arrival_rate: got 4 to 1; allowed: low:high"),
        ({"asked": {"temperature": (0.0, 1.0)}}, "asked: got 'temperature'; allowed: arrival_rate"),
        ({"asked": {"arrival_rate": (900.0, 1000.0)}}, "no question is left below 0.95 of capacity"),
        ({"max_rate": 0.1}, "no run is left|low"),
        ({"candidates": [{"draft_length": 2}]}, "candidate: got no load"),
    ],
)
def test_bad_questions_are_refused(options, message):
    deployment = unsure(toy_deployment(concurrency=None))
    with pytest.raises(InputError, match=message):
        design(deployment, **options)


def test_a_deployment_without_acceptance_or_uncertainty_says_what_to_do():
    with pytest.raises(InputError, match=r"does not tell how uncertain its parameters are .* fit the trace again"):
        design(toy_deployment())
    plain = unsure(toy_deployment(speculative=False))
    assert {point["draft_length"] for point in design(plain, 3)["points"]} == {0}
    with pytest.raises(InputError, match="has no acceptance of its own"):
        design(plain, 3, max_draft_length=4)


# --- files and the command line ---------------------------------------------------------------------------


def test_plans_are_read_by_collect_and_hold_every_run():
    answer = design(unsure(), 6, max_draft_length=6)
    lengths = sorted({point["draft_length"] for point in answer["points"]})
    files = plan_files(answer["plan"], "plan.yaml")
    assert set(files) == ({f"plan-k{k}.yaml" for k in lengths} if len(lengths) > 1 else {"plan.yaml"})
    cells = []
    for name, text in files.items():
        plan = read_plan(text, name)
        cells += [(plan.identity["draft_length"], cell.arrival_rate, cell.concurrency) for cell in plan.cells()]
        assert plan.identity["deployment"] == "toy"
    expected = [(p["draft_length"], p.get("arrival_rate"), p.get("concurrency")) for p in answer["points"]]
    assert sorted(cells, key=str) == sorted(expected, key=str)
    one = plan_files(answer["plan"][:1], "plan.yaml")
    assert set(one) == {"plan.yaml"}


def test_sweep_files_hold_every_run_with_its_server():
    answer = design(unsure(), 6, max_draft_length=6)
    files = sweep_files(answer["sweep"])
    count = 0
    for entry in answer["sweep"]:
        k = entry["draft_length"]
        (serve,) = json.loads(files[f"serve_params_k{k}.json"])
        bench = json.loads(files[f"bench_params_k{k}.json"])
        count += len(bench)
        assert ("speculative_config" in serve) == (k > 0)
        if k:
            assert serve["speculative_config"]["num_speculative_tokens"] == k
            assert serve["speculative_config"]["model"] == "tiny"
        assert len({record["_benchmark_name"] for record in bench}) == len(bench)
        for record in bench:
            assert ("request_rate" in record) != ("max_concurrency" in record)
            assert record["num_prompts"] == 200 and record["random_input_len"] == 64
        assert f"serve_params_k{k}.json" in files["run.sh"]
    assert count == len(answer["points"])


def test_the_command_keeps_the_contract_and_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "160")
    model = toy_model(tmp_path / "model.json", unsure())
    (tmp_path / "sweep").mkdir()
    options = ("--plan", tmp_path / "plan.yaml", "--sweep", tmp_path / "sweep", "--out", tmp_path / "d.json")
    ran = run("design", model, "--budget", "3", "--arrival-rate", "1:4", "--json", *options)
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert set(answer) == set(documented_keys("design"))
    assert json.loads((tmp_path / "d.json").read_text()) == answer
    for path in tmp_path.glob("plan*.yaml"):
        assert yaml.safe_load(path.read_text())["grid"]
        assert run("collect", path, "--url", "http://127.0.0.1:1", "--dry-run", "--json").code == 0
    assert (tmp_path / "sweep" / "run.sh").exists()
    ran = run("design", model, "--budget", "2", "--criterion", "decision")
    assert ran.code == 0 and "runs to make next, for decision" in ran.out and "share of gain" in ran.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arrival-rate", "a:b"), "--arrival-rate: got 'a:b'; allowed: LOW:HIGH"),
        (("--sweep", "nowhere"), "no such folder; create it first"),
        (("--acceptance-rate", "0.5", "--acceptance", "c.json"), "at most one of them"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    ran = run("design", toy_model(tmp_path / "model.json", unsure()), *options)
    assert ran.code == 2 and message in ran.err
