"""`diffspec monitor`: a live server beside its model."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson, ModelPath, Out, read_model
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax

_SOURCE, _OUTPUT, _MODEL = "What is watched (one of both)", "What leaves", "How it is compared"


def command(
    model: ModelPath,
    metrics_url: Annotated[
        str | None,
        typer.Option(
            "--metrics-url",
            metavar="URL",
            rich_help_panel=_SOURCE,
            help="The server's /metrics (vLLM, SGLang with --enable-metrics).",
        ),
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            rich_help_panel=_SOURCE,
            help="Recorded scrapes instead (of --record, of collect, or with unix times in the names); repeatable.",
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="S", rich_help_panel=_SOURCE, help="Seconds between scrapes."),
    ] = 10.0,
    count: Annotated[
        int | None,
        typer.Option("--count", metavar="N", rich_help_panel=_SOURCE, help="Stop after N scrapes; default: Ctrl-C."),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            "--deployment", metavar="D", rich_help_panel=_MODEL, help="Which one, where the model has several."
        ),
    ] = None,
    draft_length: Annotated[
        float | None,
        typer.Option(
            "--draft-length",
            metavar="K",
            rich_help_panel=_MODEL,
            help="Drafted tokens per step, where the engine does not tell.",
        ),
    ] = None,
    max_draft_length: Annotated[
        int,
        typer.Option(
            "--max-draft-length", metavar="K", rich_help_panel=_MODEL, help="Longest draft length to be advised."
        ),
    ] = 8,
    closed_loop: Annotated[
        bool,
        typer.Option(
            "--closed-loop",
            rich_help_panel=_MODEL,
            help="Ask at the measured number in the system, not at the arrival rate.",
        ),
    ] = False,
    average_run_length: Annotated[
        float,
        typer.Option(
            "--average-run-length",
            metavar="N",
            rich_help_panel=_MODEL,
            help="Windows between two false alarms; fewer find smaller changes sooner.",
        ),
    ] = 10_000.0,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", rich_help_panel=_OUTPUT, help="Keep the scrapes, for --replay."),
    ] = None,
    export_port: Annotated[
        str | None,
        typer.Option(
            "--export-port",
            metavar="[HOST:]PORT",
            rich_help_panel=_OUTPUT,
            help="Say the same as Prometheus metrics at http://127.0.0.1:PORT/metrics meanwhile.",
        ),
    ] = None,
    grafana: Annotated[
        Path | None,
        typer.Option(
            "--grafana", metavar="FILE.JSON", rich_help_panel=_OUTPUT, help="Write a Grafana dashboard of them."
        ),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Watch a live server: measured beside predicted, stages, headroom, the best draft length now, and what changed.

    Example: diffspec monitor model.json --metrics-url http://127.0.0.1:8000/metrics --interval 10

    Without a server: diffspec monitor model.json --replay recorded.txt

    --json prints one object a line: an event for each scrape, the summary last. Exit code 1 if no window could be
    compared with the model.
    """
    prepare_jax()
    from diffspec.monitoring import exporting, monitor, scrapes
    from diffspec.monitoring.dashboard import dashboard
    from diffspec.report import monitor_tables
    from diffspec.report.files import check_target, json_text, write_files
    from diffspec.results import InputError
    from diffspec.workload import check_range

    if (metrics_url is None) == (not replay):
        got = "neither" if metrics_url is None else "both"
        raise InputError(f"--metrics-url or --replay: got {got}; allowed: an address, or recorded scrapes")
    if replay and record is not None:
        raise InputError("--record goes with --metrics-url: a replay is a recording already")
    check_range("--interval", interval, 0.01, 86400, low_open=False, unit="s")
    check_range("--count", count, 1, 1e9, low_open=False, unit="scrapes")
    inputs = (model, *(replay or ()))
    for path in (record, grafana, out):
        if path is not None:
            check_target(path, inputs)
    url = None if metrics_url is None else scrapes.metrics_url(metrics_url)
    watched = monitor.Monitor(
        read_model(model).deployment(deployment),
        draft_length=draft_length,
        max_draft_length=max_draft_length,
        closed_loop=closed_loop,
        average_run_length=average_run_length,
    )
    source = scrapes.recorded(replay)[:count] if replay else scrapes.live(str(url), interval, count)
    if grafana is not None:
        write_files({grafana: json_text(dashboard()) + "\n"})
        note([str(grafana)], "wrote")
    exporter = None if export_port is None else exporting.Exporter(export_port)
    if exporter is not None:
        note([f"metrics at {exporter.url}"])
    say = _Speaker(as_json)
    try:
        if record is not None:
            write_files({record: ""})
        for scrape in source:
            if record is not None:
                with record.open("a", encoding="utf-8") as file:
                    file.write(scrapes.as_recording(scrape))
            event = watched.take(scrape)
            if exporter is not None:
                exporter.publish(exporting.exposition(watched))
            say(event, monitor_tables.event)
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise InputError(f"{error.filename or record}: cannot be written: {error.strerror or error}") from None
    finally:
        say.close()
        if exporter is not None:
            exporter.close()
    told = watched.summary()
    if out is not None:
        write_files({out: json_text(told | {"windows": watched.events}) + "\n"})
    if as_json:
        say(told, monitor_tables.event)
    else:
        deliver(told, monitor_tables.summary, as_json=False)
    if out is not None:
        note([str(out)], "wrote")
    if not watched.compared:
        raise typer.Exit(1)


class _Speaker:
    """Events as they come: JSON lines, or a table that is drawn in one place of a terminal and below it elsewhere."""

    def __init__(self, as_json: bool):
        import sys

        self.as_json, self._live = as_json, None
        if not as_json and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=sys.stdout, highlight=False), auto_refresh=False)
            self._live.start()

    def __call__(self, event, show) -> None:
        import json
        import sys

        if self.as_json:
            from diffspec.report.files import json_text

            sys.stdout.write(json.dumps(json.loads(json_text(event))) + "\n")
            sys.stdout.flush()
        elif self._live is not None:
            if event["anomalies"] or event["predicted"] is None:
                self._live.console.print(show(event))
            else:
                self._live.update(show(event), refresh=True)
        else:
            deliver(event, lambda told: [show(told)], as_json=False)

    def close(self) -> None:
        """Leave the last table where it is."""
        if self._live is not None:
            self._live.stop()
