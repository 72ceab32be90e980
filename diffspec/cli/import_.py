"""`diffspec import`: files of any tool become one trace."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffspec.cli.options import AsJson, Assignments, Identity, read_columns
from diffspec.cli.output import deliver, note


def command(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Results of vLLM, SGLang, GuideLLM, /metrics, tables; files or folders."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="TRACE", help="Where to write the trace: .csv or .parquet.")
    ] = None,
    assignments: Assignments = None,
    identity: Identity = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave bad rows out; they go to TRACE.bad_rows.csv.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read benchmark results as they are, say what they are, check them, and write them as one trace.

    Formats are recognised by content: vllm bench serve (also sweeps and forward), SGLang bench_serving, GuideLLM,
    /metrics of vLLM and SGLang (joined to the benchmark they belong to), request tables, operating-point tables.

    Example: diffspec import run.json before.txt after.txt --set hardware=H200 --out trace.csv
    """
    from diffspec.report import trace_tables
    from diffspec.report.files import check_target
    from diffspec.results import InputError
    from diffspec.traces import check, to_csv, to_parquet
    from diffspec.traces.gather import gather, import_answer, refuse_others
    from diffspec.traces.trace import trace_of

    if out is not None:
        if out.suffix.lower() not in (".csv", ".parquet"):
            raise InputError(f"--out: got {str(out)!r}; allowed: a name that ends in .csv or .parquet")
        check_target(out, tuple(files))
    columns = read_columns(identity, assignments)
    gathered = gather(files)
    trace = None
    if gathered.points:
        trace = trace_of(gathered, skip_bad_rows=skip_bad_rows, identity=columns)
    if trace is None and not gathered.of("arrivals"):
        refuse_others(gathered)
    answer: dict[str, Any] = import_answer(gathered, trace, None if trace is None else check(trace))
    contents: dict[Path, str | bytes] = {}
    if out is not None and trace is not None:
        contents[out] = to_csv(trace.frame) if out.suffix.lower() == ".csv" else to_parquet(trace.frame)
        if trace.bad_rows is not None and len(trace.bad_rows):
            contents[out.with_name(out.name + ".bad_rows.csv")] = trace.bad_rows.to_csv(index=False)
    elif out is not None:
        raise InputError("--out: there are no operating points to write; arrivals are replayed by a plan of 'collect'")
    answer["out"] = None if out is None else str(out)
    note(answer["warnings"], "warning")
    deliver(answer, trace_tables.imported, as_json=as_json, files=contents, inputs=tuple(files))
