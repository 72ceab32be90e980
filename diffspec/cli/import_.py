"""`diffspec import`: files of any tool become one trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffspec.cli.options import AsJson, Assignments, Identity, read_columns
from diffspec.cli.output import deliver, note, progress_bar

if TYPE_CHECKING:
    from diffspec.traces.gather import Gathered

ENGINES = ("process", "dask")


def command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Results of vLLM, SGLang, GuideLLM, /metrics, tables; files or folders. With --engine dask request "
            "tables, also patterns and addresses such as s3://bucket/logs/*.parquet.",
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
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="process|dask",
            help="Who reads: this process, each file a table of its own; or the workers of a Dask cluster, all files "
            "one request table, in any order.",
        ),
    ] = "process",
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", metavar="ADDRESS", help="A running Dask cluster; without it one starts on this machine."
        ),
    ] = None,
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

    here = tuple(Path(file) for file in files if "://" not in file)
    if out is not None:
        if out.suffix.lower() not in (".csv", ".parquet"):
            raise InputError(f"--out: got {str(out)!r}; allowed: a name that ends in .csv or .parquet")
        check_target(out, here)
    if engine not in ENGINES:
        raise InputError(f"--engine: got {engine!r}; allowed: {' or '.join(ENGINES)}")
    columns = read_columns(identity, assignments)
    partitions = None
    if engine == "dask":
        gathered, partitions = _on_dask(files, scheduler)
    else:
        if scheduler is not None:
            raise InputError("--scheduler: given without --engine dask")
        for file in files:
            if "://" in file:
                raise InputError(f"{file}: addresses are read with --engine dask")
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
    answer |= {"out": None if out is None else str(out), "engine": engine, "partitions": partitions}
    note(answer["warnings"], "warning")
    deliver(answer, trace_tables.imported, as_json=as_json, files=contents, inputs=here)


def _on_dask(files: list[str], scheduler: str | None) -> tuple["Gathered", int]:
    """The request table of all files, by the workers of a cluster, and the number of its partitions."""
    from diffspec.traces.dask_runner import dask_runner
    from diffspec.traces.scale import gather_logs

    with progress_bar("starting workers") as report, dask_runner(scheduler) as run:
        return gather_logs(files, run, report)
