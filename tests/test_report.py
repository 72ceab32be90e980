"""Tables, figures and files from plain answers; curves agree with single predictions."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from test_cli_main import TRACE, files_in, toy_deployment

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.report import figures, tables
from diffspec.report.curves import draw_curves
from diffspec.report.files import check_target, json_text, write_files
from diffspec.report.measured import ScoredPart, fitted_and_held_out
from diffspec.report.numbers import metric_value, milliseconds, percent, quantity, significant, span
from diffspec.results import InputError
from diffspec.traces import read_trace
from diffspec.workload import Workload


def shown(*parts) -> str:
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


# --- numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (significant(0.0), "0"),
        (significant(123456.0), "123456"),
        (significant(1.5e-9), "1.50e-09"),
        (significant(9.999), "10"),
        (significant(-0.5), "-0.5"),
        (significant(math.inf), "-"),
        (milliseconds(None), "-"),
        (milliseconds(12.0), "12000 ms"),
        (percent(math.nan), "-"),
        (quantity(2.0, "req/s"), "2 req/s"),
        (quantity(None, "s"), "-"),
        (metric_value("throughput", 2.0), "2 req/s"),
        (metric_value("ttft_mean", 0.05), "50 ms"),
        (metric_value("utilization", None), "-"),
        (span([1.0, 2.0]), "1 to 2"),
    ],
)
def test_numbers_as_people_read_them(told, expected):
    assert told == expected


# --- files --------------------------------------------------------------------------


def test_json_has_no_nan_and_takes_arrays():
    data = {"a": np.float64(1.5), "b": np.array([1.0, math.nan]), "c": -math.inf, "d": (True, None), "e": np.int64(3)}
    assert json.loads(json_text(data)) == {"a": 1.5, "b": [1.0, None], "c": None, "d": [True, None], "e": 3}


def test_files_are_written_all_or_none(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_files({tmp_path / "a.txt": "a", tmp_path / "nowhere" / "b.txt": "b"})
    assert files_in(tmp_path) == {"folder"}
    write_files({tmp_path / "a.txt": "ä", tmp_path / "b.bin": b"\x00"})
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode() and (tmp_path / "b.bin").read_bytes() == b"\x00"


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    try:
        (tmp_path / "link").symlink_to("real")
    except OSError:
        pytest.skip("no symbolic links here")
    write_files({tmp_path / "link": "new"})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_targets_are_checked_beforehand(tmp_path):
    (tmp_path / "in.csv").write_text("x")
    check_target(tmp_path / "out.json", (tmp_path / "in.csv",))
    for path in (tmp_path, tmp_path / "no" / "out", tmp_path / "in.csv"):
        with pytest.raises(InputError):
            check_target(path, (tmp_path / "in.csv",))


# --- curves -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployment():
    return toy_deployment()


@pytest.fixture(scope="module")
def curves(deployment):
    return draw_curves(
        deployment,
        [0, 2, 4],
        prompt_length=64.0,
        output_length=64.0,
        arrival_rates=np.linspace(0.5, 40.0, 80),
        concurrencies=np.array([1.0, 8.0]),
    )


@pytest.fixture(scope="module")
def crossing(deployment):
    """Open-loop curves at an acceptance with which speculation stops paying at some load."""
    return draw_curves(
        deployment,
        [0, 2, 4],
        prompt_length=64.0,
        output_length=64.0,
        arrival_rates=np.linspace(0.5, 20.0, 79),
        acceptance=ConstantAcceptance(0.5),
    )["arrival_rate"]


@pytest.mark.parametrize("k", [0, 2, 4])
def test_curves_agree_with_predict(deployment, curves, k):
    curve = curves["arrival_rate"]
    workload = Workload(prompt_length=64.0, output_length=64.0, arrival_rate=float(curve.loads[5]))
    answer = predict_answer(deployment, workload, deployment.configuration(float(k)))
    for name in ("ttft", "itl", "tpot", "e2e_latency"):
        assert curve.of(name, k)[5] == pytest.approx(answer[name], rel=1e-9)
    stages = {stage: curve.stages[stage][curve.draft_lengths.index(k)][5] for stage in curve.stages}
    assert sum(stages.values()) == pytest.approx(answer["e2e_latency"], rel=1e-9)
    if k:
        assert curve.speedup(k)[5] == pytest.approx(answer["speedup"], rel=1e-9)
    assert curve.breakeven(4) is None  # with this acceptance speculation pays up to capacity


def test_saturated_loads_are_left_open(curves):
    curve = curves["arrival_rate"]
    beyond = curve.loads > curve.capacity[0]
    assert beyond.any() and np.isnan(curve.of("e2e_latency", 0)[beyond]).all()
    assert np.isfinite(curves["concurrency"].of("e2e_latency", 4)).all()


@pytest.mark.parametrize("k", [2, 4])
def test_breakeven_is_predicts(deployment, crossing, k):
    workload = Workload(prompt_length=64.0, output_length=64.0, arrival_rate=1.0)
    config = deployment.configuration(float(k), acceptance=ConstantAcceptance(0.5))
    told = predict_answer(deployment, workload, config)["breakeven_rate"]
    assert crossing.breakeven(k) == pytest.approx(told, rel=2e-3)


def test_curves_without_speculation():
    plain = toy_deployment(speculative=False)
    made = draw_curves(plain, [0], prompt_length=64.0, output_length=64.0, arrival_rates=np.array([1.0]))
    assert np.isfinite(made["arrival_rate"].of("e2e_latency", 0)).all()


def test_curves_take_another_acceptance(deployment, curves):
    made = draw_curves(
        deployment,
        [2],
        prompt_length=64.0,
        output_length=64.0,
        arrival_rates=np.array([0.5]),
        acceptance=ConstantAcceptance(1.0),
    )
    assert made["arrival_rate"].of("e2e_latency", 2)[0] < curves["arrival_rate"].of("e2e_latency", 2)[0]


# --- figures ------------------------------------------------------------------------


class Scored:
    """Predictions 5 % above the measurements, without a model."""

    def __init__(self, frame):
        names = ("ttft_mean", "itl_mean", "e2e_mean", "throughput")
        self.frame = frame
        self.measured = {name: frame[name].to_numpy(float) for name in names}
        self.predicted = {name: 1.05 * values for name, values in self.measured.items()}
        self.saturated = np.zeros(len(frame), dtype=bool)
        self.utilization = np.full(len(frame), 0.3)


@pytest.fixture(scope="module")
def parts():
    frame = read_trace(TRACE).frame
    apart = (frame["arrival_rate"] == 3).to_numpy()
    made = []
    for label, rows in (("fitted", ~apart), ("held out", apart)):
        part = object.__new__(ScoredPart)  # past the run-time check of field types
        for name, value in (("label", label), ("deployment", "d"), ("scored", Scored(frame[rows]))):
            object.__setattr__(part, name, value)
        made.append(part)
    return made


def visible(figure):
    return [ax for ax in figure.axes if ax.get_visible()]


def labelled(figure) -> bool:
    return all(ax.get_xlabel() and ax.get_ylabel() for ax in visible(figure))


def legend(figure) -> list[str]:
    return [text.get_text() for made in figure.legends for text in made.get_texts()]


def test_measured_against_predicted(parts, monkeypatch):
    monkeypatch.setattr(figures, "scored_columns", lambda s: {n: np.isfinite(v) for n, v in s.measured.items()})
    figure = figures.against_measured(parts, "a title")
    assert len(visible(figure)) == 6 and labelled(figure)  # two loops, four observables
    assert {"no speculation", "draft length 2", "draft length 4", "held out"} <= set(legend(figure))
    assert figures.png(figure).startswith(b"\x89PNG")


def test_latency_curves(parts, curves):
    figure = figures.latency_curves(curves, parts, "a title", {"arrival_rate": 4.0})
    assert len(visible(figure)) == 4 and labelled(figure)
    assert "beyond the measured loads" in legend(figure)
    points = sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() not in ("None", "", None))
    assert points == 15  # every open-loop row


def test_stages_and_speedup(crossing):
    figure = figures.stages_by_load(crossing, [0, 4], "a title")
    assert len(visible(figure)) == 2 and labelled(figure)
    assert {"verify", "draft", "prefill"} <= set(legend(figure))
    figure = figures.speedup_by_load(crossing, "a title", {2: (np.array([1.0]), np.array([1.2]))}, 4.0)
    told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("break-even at" in text for text in told) and labelled(figure)


def test_a_figure_of_real_predictions(tmp_path):
    trace = read_trace(TRACE)
    made = fitted_and_held_out(toy_deployment("vllm-cpu/llama-29m"), trace, "arrival_rate==3")
    assert [(part.label, len(part.scored.frame)) for part in made] == [("fitted", 24), ("held out", 3)]
    assert figures.png(figures.against_measured(made, "a title")).startswith(b"\x89PNG")


# --- tables -------------------------------------------------------------------------

SCORE = {"rows": 3, "mape": 0.0523, "max_ape": 0.2, "r2": None, "bias": None}


def test_errors_as_percentages():
    told = shown(tables.errors({"fitted rows": {"e2e_mean": SCORE}, "held out": {"ttft_mean": SCORE}}, "errors"))
    assert "5.2 %" in told and "20.0 %" in told and "held out" in told


def test_names_are_never_read_as_markup():
    told = shown(
        *tables.evaluation(
            {
                "rows": 3,
                "deployments": ["[red]name[/]"],
                "metrics": {"e2e_mean": SCORE},
                "set_aside": {"[bold]failed": 2},
                "saturated_rows": 1,
                "not_predicted": ["ttft_p99"],
            }
        )
    )
    assert "[bold]failed" in told and "[red]name[/]" in told
    assert "1 rows are predicted to saturate" in told and "ttft_p99" in told


def test_a_load_without_an_answer_says_which_limit_fails():
    entry = {
        "load_from": 5.0,
        "load_to": 6.0,
        "draft_length": None,
        "metrics": {"ttft_mean": 0.3},
        "speedup": None,
        "headroom": None,
        "violations": {"ttft_mean<0.2": {"value": 0.3, "bound": 0.2}},
    }
    told = shown(*tables.policy({"policy": [entry], "objective": "e2e_mean", "outcome": "infeasible"}))
    assert "none will do" in told and "ttft_mean<0.2 fails: the best is 300 ms, off by 50.0 %" in told
