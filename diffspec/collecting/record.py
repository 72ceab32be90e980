"""What a collection leaves on disk, and how an interrupted one goes on.

    OUT/operating_points.csv        one row a finished cell: the table to fit
    OUT/requests.csv                one row a request of the finished cells
    OUT/plan.yaml                   the plan as it was run
    OUT/raw/CELL.jsonl              a header line, one line a request with the time of every chunk, a closing line
    OUT/raw/CELL.metrics.txt        every scrape of /metrics, each after a line "# scrape <unix time>"

The raw file is written request by request; a cell is finished when its closing line, which holds its row, is there. A
cell without it was interrupted: its raw file is kept as CELL.partial.jsonl and the cell is measured again.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..results import InputError
from ..traces import rows_to_csv
from .client import Sent
from .drive import Run, scrapes_text
from .plan import Cell, Plan

REQUEST_COLUMNS = (
    *("deployment", "run", "method", "draft_length", "arrival_rate", "arrival_process", "arrival_scv", "concurrency"),
    *("max_batch_size", "arrival_time", "first_token_time"),
    *("completion_time", "prompt_tokens", "output_tokens", "drafted_tokens", "accepted_tokens", "stream_events"),
    *("ok", "measured"),
)


class Recorder:
    """The files of one collection under `out`."""

    def __init__(self, out: Path, plan: Plan):
        self.out, self.plan = out, plan
        self.raw = out / "raw"

    def open(self) -> None:
        """Create the folder, or take up the one that is there. Raises `InputError` when it holds another plan's cells
        or cannot be written."""
        text = yaml.safe_dump(self.plan.to_dict(), sort_keys=False, allow_unicode=True)
        kept = self.out / "plan.yaml"
        foreign = [name for name in ("operating_points.csv", "requests.csv") if (self.out / name).exists()]
        if foreign and not kept.exists():
            raise InputError(f"{self.out}: holds {foreign[0]}, but no plan.yaml: no collection; name another folder")
        try:
            self.raw.mkdir(parents=True, exist_ok=True)
            if kept.exists() and not _same_measurement(kept.read_text(encoding="utf-8"), text):
                raise InputError(
                    f"{self.out}: holds the results of another plan (plan.yaml differs); name another folder"
                )
            _replace(kept, text)
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written: {error.strerror or error}") from None

    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the plan's finished cells by the name of the cell. Raw files without a closing line are set aside.
        Raises `InputError` when a cell of that name was measured otherwise."""
        found, asked = {}, {cell.name: _asked(cell) for cell in self.plan.cells()}
        for path in sorted(self.raw.glob("*.jsonl")):
            if path.name.endswith(".partial.jsonl"):
                continue
            row = _closing(path)
            if row is None:
                count = len(list(self.raw.glob(f"{path.stem}.*partial.jsonl")))
                path.replace(path.with_name(f"{path.stem}.{f'{count + 1}.' if count else ''}partial.jsonl"))
            elif path.stem in asked:
                if _header(path).get("asked") != asked[path.stem]:
                    raise InputError(
                        f"{self.out}: cell {path.stem} was measured as another plan asked; name another folder"
                    )
                found[path.stem] = row
        return found

    def start(self, cell: Cell, header: dict[str, Any]) -> None:
        """Begin a cell's raw file."""
        line = json.dumps({"cell": cell.name, "asked": _asked(cell), **header})
        (self.raw / f"{cell.name}.jsonl").write_text(line + "\n", encoding="utf-8")

    def add(self, cell: Cell, sent: Sent) -> None:
        """Append one request to the cell's raw file, safe against a crash of the client from then on."""
        with (self.raw / f"{cell.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_raw(sent)) + "\n")

    def finish(self, cell: Cell, run: Run, row: dict[str, Any]) -> None:
        """Write the scrapes, every request with its final phase, and the closing line; then the tables anew."""
        if run.scrapes:
            _replace(self.raw / f"{cell.name}.metrics.txt", scrapes_text(run.began_unix, run.scrapes))
        path = self.raw / f"{cell.name}.jsonl"
        header = path.read_text(encoding="utf-8").split("\n", 1)[0]
        lines = [header, *(json.dumps(_raw(sent)) for sent in run.sent), json.dumps({"row": row})]
        _replace(path, "\n".join(lines) + "\n")
        self.write_tables()

    def write_tables(self) -> None:
        """The operating points and requests of all finished cells, in the order of the plan."""
        rows = self.rows()
        cells = [cell for cell in self.plan.cells() if cell.name in rows]
        if not cells:
            return
        _replace(self.out / "operating_points.csv", rows_to_csv([rows[cell.name] for cell in cells]))
        table = io.StringIO()
        writer = csv.DictWriter(table, REQUEST_COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for cell in cells:
            identity = {name: rows[cell.name].get(name) for name in REQUEST_COLUMNS[:9]}
            writer.writerows(identity | request for request in self._requests(cell))
        _replace(self.out / "requests.csv", table.getvalue())

    def _requests(self, cell: Cell) -> Iterator[dict[str, Any]]:
        for line in (self.raw / f"{cell.name}.jsonl").read_text(encoding="utf-8").splitlines()[1:-1]:
            sent = json.loads(line)
            yield {
                **{
                    name: sent.get(name)
                    for name in ("prompt_tokens", "output_tokens", "drafted_tokens", "accepted_tokens")
                },
                "arrival_time": sent["arrival"],
                "first_token_time": sent["events"][0] if sent["events"] else None,
                "completion_time": sent["completion"],
                "stream_events": len(sent["events"]) or None,
                "ok": "true" if sent["error"] is None else "false",
                "measured": "true" if sent["phase"] == "measured" else "false",
            }


def _raw(sent: Sent) -> dict[str, Any]:
    speculation = (sent.metrics or {}).get("speculative_decoding")
    speculation = speculation if isinstance(speculation, dict) else {}
    return {
        "phase": sent.phase,
        "arrival": round(sent.arrival, 6),
        "sent": round(sent.sent, 6),
        "completion": None if sent.completion is None else round(sent.completion, 6),
        "prompt_tokens": sent.prompt_tokens if sent.prompt_tokens is not None else sent.asked_prompt,
        "output_tokens": sent.output_tokens,
        "drafted_tokens": speculation.get("num_draft_tokens"),
        "accepted_tokens": speculation.get("num_accepted_draft_tokens"),
        "task": sent.task,
        "temperature": sent.temperature,
        "error": sent.error,
        "events": [round(moment, 6) for moment in sent.events],
        "metrics": sent.metrics,
    }


def _asked(cell: Cell) -> dict[str, Any]:
    """The cell as plain data, as JSON gives it back."""
    return json.loads(json.dumps(asdict(cell)))


def _header(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())


def _closing(path: Path) -> dict[str, Any] | None:
    try:
        last = path.read_text(encoding="utf-8").rstrip("\n").rsplit("\n", 1)[-1]
        value = json.loads(last)
    except (OSError, ValueError):
        return None
    return value.get("row") if isinstance(value, dict) else None


def _same_measurement(one: str, other: str) -> bool:
    """Whether two plans measure in the same way; the address and the caps may differ, and cells may have been added."""

    def core(text: str) -> Any:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("server"), dict):
            return None
        server = {name: value["server"].get(name) for name in ("model", "endpoint", "extra", "metrics")}
        return server, *(value.get(name) for name in ("identity", "measure", "prompts"))

    return core(one) == core(other)


def _replace(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
