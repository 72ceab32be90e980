"""`diffspec import` and `diffspec collect` from the command line: what they say, write, and refuse."""

import json

import pandas as pd
import pytest
from bench_samples import VLLM_OPEN
from fake_server import FakeServer, running

from diffspec.cli import main
from diffspec.traces import read_trace

METRICS = """\
vllm:generation_tokens_total{{model_name="m"}} {tokens}
vllm:request_success_total{{finished_reason="length",model_name="m"}} {requests}
vllm:num_preemptions_total{{model_name="m"}} {preemptions}
vllm:spec_decode_num_drafts_total{{model_name="m"}} {drafts}
vllm:spec_decode_num_draft_tokens_total{{model_name="m"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="m",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="m",position="1"}} {second}
"""
BEFORE = dict(tokens=1000, requests=30, preemptions=1, drafts=100, drafted=200, accepted=90, first=60, second=30)
AFTER = dict(tokens=2280, requests=70, preemptions=4, drafts=660, drafted=1320, accepted=762, first=508, second=254)


@pytest.fixture
def run(tmp_path):
    """A benchmark result with the scrapes before and after it."""
    files = {"run.json": json.dumps(VLLM_OPEN), "a.txt": METRICS.format(**BEFORE), "b.txt": METRICS.format(**AFTER)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in files]


def test_a_benchmark_is_joined_with_its_counters_and_written(run, tmp_path, capsys):
    for suffix in ("csv", "parquet"):
        out = tmp_path / f"trace.{suffix}"
        arguments = ["import", *run, "--set", "hardware=1 H200", "--set", "draft_length=2", "--out", str(out), "--json"]
        assert main(arguments) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [entry["gives"] for entry in answer["files"]] == ["operating points", "counters", "counters"]
        row = read_trace(out).frame.iloc[0]
        # 560 drafts of two tokens: 448 accepted the first, 224 also the second
        assert row["tokens_per_step"] == pytest.approx(1 + 672 / 560)
        assert row["position_acceptance"] == pytest.approx((0.8, 0.5))
        assert row["preemptions"] == 3 and row["hardware"] == "1 H200" and row["draft_length"] == 2
        assert row["ttft_mean"] == pytest.approx(0.1)
        assert answer["table"][0]["tokens_per_step"] == pytest.approx(2.2)
        assert {"stationary", "findings", "deployments", "out", "rows", "arrivals", "warnings"} <= set(answer)


def test_the_screen_names_formats_and_checks(run, capsys):
    assert main(["import", *run]) == 0
    shown = capsys.readouterr().out
    assert "vllm bench serve JSON" in shown and "/metrics" in shown and "2 req/s" in shown and "little's law" in shown


def test_identity_from_a_file(run, tmp_path, capsys):
    identity = tmp_path / "identity.yaml"
    identity.write_text("{hardware: H200, deployment: chat, draft_length: 2}\n")
    assert main(["import", *run, "--identity", str(identity), "--set", "deployment=code", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["table"][0]["deployment"] == "code" and answer["table"][0]["hardware"] == "H200"
    assert any("deployment set to code, in place of org/verifier" in line for line in answer["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "colour=red"], "unknown column 'colour'"),
        (["--set", "drafter_parms=3"], "did you mean 'drafter_params'"),
        (["--set", "hardware"], "KEY=VALUE"),
        (["--set", "hardware={a: 1}"], "a number or a text"),
        (["--set", "draft_length=many"], "draft_length"),
        (["--set", "hardware=[unclosed"], "not valid YAML"),
        (["--out", "trace.xlsx"], "ends in .csv or .parquet"),
        (["--out", "nowhere/trace.csv"], "does not exist"),
        (["--identity", "absent.yaml"], "cannot be read"),
    ],
)
def test_refusals_write_nothing(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["import", *run, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_log_of_arrivals_is_summarised(tmp_path, capsys):
    log = tmp_path / "log.csv"
    log.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:15:{second:02d}.0000000,{100 + second},20\n" for second in range(0, 60, 2))
    )
    assert main(["import", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["arrivals"][0]
    assert found["arrival_rate"] == pytest.approx(0.5) and found["prompt_length"] == pytest.approx(129)
    assert main(["import", str(log)]) == 0
    assert "arrival rate" in capsys.readouterr().out
    assert main(["import", str(log), "--out", str(tmp_path / "x.csv")]) == 2
    assert "no operating points" in capsys.readouterr().err
    assert main(["check", str(log)]) == 2
    assert "diffspec import summarises it" in capsys.readouterr().err


def test_fit_takes_files_as_they_are(tmp_path, capsys):
    """Results of a synthetic server with a step of 20 ms + 1 ms a request, as a benchmark client would write them."""
    for users in (1, 2, 4, 8, 16):
        step = 0.020 + 0.001 * users
        record = VLLM_OPEN | {
            "request_rate": "inf",
            "max_concurrency": users,
            "duration": 40 * (0.05 + 31 * step) / users,
            "request_throughput": users / (0.05 + 31 * step),
            "mean_ttft_ms": 50.0,
            "mean_tpot_ms": 1e3 * step,
            "mean_itl_ms": 1e3 * step,
            "mean_e2el_ms": 1e3 * (0.05 + 31 * step),
            "completed": 100,
            "num_prompts": 100,
            "total_input_tokens": 6400,
            "total_output_tokens": 3200,
        }
        (tmp_path / f"c{users}.json").write_text(json.dumps(record))
    model = tmp_path / "model.json"
    arguments = ["fit", str(tmp_path), "--step-time", "affine", "--no-plot", "--out", str(model), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == 5
    assert answer["deployments"][0]["quality"]["metrics"]["itl_mean"]["mape"] < 0.02


def test_a_plan_is_shown_and_carried_out(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "limits: {max_requests: 200}\nmeasure: {requests: 20, warmup_requests: 3, settle_seconds: 0}\n"
        "identity: {deployment: fake, draft_length: 2}\n"
        "grid: [{arrival_rate: 60, prompt_length: 8, output_length: 5}]\n"
    )
    assert main(["collect", str(plan), "--dry-run"]) == 2
    assert "max_rate is missing" in capsys.readouterr().err
    assert main(["collect", str(plan), "--dry-run", "--max-rate", "100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["requests"] == 23 and shown["cells"][0]["name"] == "p8_o5_r60"
    assert main(["collect", str(plan), "--dry-run", "--max-rate", "100"]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert main(["collect", str(plan), "--max-rate", "100", "--out", str(tmp_path / "out")]) == 2
    assert "url" in capsys.readouterr().err
    with running(FakeServer(first=0.005, gap=0.001)) as server:
        asked = ["collect", str(plan), "--max-rate", "100", "--url", server.url, "--out", str(tmp_path / "out")]
        assert main([*asked, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert main(asked) == 0
        assert "1 kept from before" in capsys.readouterr().out
    assert answer["measured"] == ["p8_o5_r60"] and answer["cells"][0]["n_requests"] == 20
    table = pd.read_csv(answer["table"])
    assert table["throughput"].iloc[0] == pytest.approx(60, rel=0.6)


def test_a_template_and_no_plan(capsys):
    assert main(["collect", "--template"]) == 0
    assert "grid:" in capsys.readouterr().out
    assert main(["collect"]) == 2
    assert "PLAN.YAML is missing" in capsys.readouterr().err


def test_counters_of_another_server_are_not_joined(tmp_path, capsys):
    """A benchmark that drafted beside the scrapes of a server that did not, with the same requests and tokens."""
    plain = "".join(line for line in METRICS.splitlines(keepends=True) if "spec_decode" not in line)
    drafted = VLLM_OPEN | {"spec_decode_num_drafts": 500, "spec_decode_draft_tokens": 1000}
    drafted |= {"spec_decode_acceptance_length": 2.0, "spec_decode_per_position_acceptance_rates": [0.6, 0.4]}
    files = {"run.json": json.dumps(drafted), "a.txt": plain.format(**BEFORE), "b.txt": plain.format(**AFTER)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["import", *(str(tmp_path / name) for name in files), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert any("another server's?" in line for line in answer["warnings"])
    assert answer["table"][0]["tokens_per_step"] == pytest.approx(2.0)


def test_acceptance_of_two_scrapes_needs_no_load(run, tmp_path, capsys):
    curve = tmp_path / "curve.json"
    assert main(["acceptance", *run[1:], "--out", str(curve), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert [position["acceptance"] for position in group["positions"]] == pytest.approx([0.8, 0.5])
    assert curve.exists()


def test_a_failed_run_does_not_stop_a_sweep(tmp_path, capsys):
    good = VLLM_OPEN | {"request_rate": 2.0}
    failed = VLLM_OPEN | {"completed": 0, "total_output_tokens": 0, "failed": 40}
    for name, record in (("a.json", good), ("b.json", failed)):
        (tmp_path / name).write_text(json.dumps(record))
    out = tmp_path / "trace.csv"
    assert main(["import", str(tmp_path), "--out", str(out)]) == 2, "said, unless it may be left out"
    assert main(["import", str(tmp_path), "--skip-bad-rows", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1 and out.with_name("trace.csv.bad_rows.csv").exists()
    (tmp_path / "a.json").unlink()
    assert main(["import", str(tmp_path), "--skip-bad-rows", "--out", str(out)]) == 2, "nothing is left"


def test_fit_and_check_take_what_the_files_do_not_tell(tmp_path, capsys):
    """--set gives a missing column; a deployment with too few rows is left out and said."""
    rows = [
        {"deployment": "big", "concurrency": users, "output_length": 33, "itl_mean": 0.02 + 0.001 * users}
        for users in (1, 2, 4, 8, 16)
    ]
    rows.append(rows[0] | {"deployment": "small"})
    table = tmp_path / "runs.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    assert main(["check", str(table)]) == 2
    assert "--set" in capsys.readouterr().err
    told = ("--set", "draft_length=0", "--set", "prompt_length=64")
    assert main(["check", str(table), *told, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    arguments = ["fit", str(table), *told, "--step-time", "affine", "--no-plot", "--out", str(tmp_path / "m.json")]
    assert main([*arguments, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["deployments"]
    assert entry["deployment"] == "big"
    assert any("fewer than 4 usable rows: small" in line for line in entry["warnings"])


def test_a_dry_run_reads_the_files_of_the_plan(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "limits: {max_rate: 10, max_requests: 50}\nmeasure: {requests: 5, warmup_requests: 1}\n"
        "grid: [{replay: arrivals.csv, prompt_length: 8, output_length: 5}]\n"
    )
    assert main(["collect", str(plan), "--dry-run"]) == 2
    assert "arrivals.csv" in capsys.readouterr().err
