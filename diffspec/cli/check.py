"""`diffspec check`: what a trace is good for, on one screen."""

from diffspec.cli.options import AsJson, Assignments, Identity, Out, TracePaths, read_columns
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax


def command(
    traces: TracePaths,
    assignments: Assignments = None,
    identity: Identity = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Check a trace: which rows can be fitted, which identities hold, what is missing.

    Example: diffspec check runs.csv
    """
    prepare_jax()
    from diffspec.report import tables
    from diffspec.traces import check, read_trace

    trace = read_trace(traces, identity=read_columns(identity, assignments))
    answer = {"rows": len(trace), "sources": trace.sources, "warnings": trace.warnings} | check(trace).to_dict()
    note(trace.warnings, "warning")
    deliver(answer, tables.check_summary, as_json=as_json, out=out, inputs=tuple(traces))
