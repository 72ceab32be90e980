"""Files as no tool should write them: small valid files of every format, mutated, and what a reader may do with them.

`SEEDS` holds the valid files by format. ``mutation(name, number)`` is the same bytes in every run: one to three changes
of the bytes, or of what they mean (values of JSON, cells and columns of tables, numbers of an exposition, types of
Parquet). `judge` reads a file as `diffspec import` and `diffspec acceptance` do and says "accepted" or "refused"; it
fails where the outcome is neither a sound answer nor a `TraceError` that names the file.
"""

import copy
import csv
import gzip
import io
import json
import math
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from bench_samples import (
    CONCURRENT,
    POISSON,
    SGLANG,
    SGLANG_2024,
    VLLM,
    VLLM_OPEN,
    VLLM_SECONDS,
    VLLM_SPEC,
    benchmark,
    report,
    sweep_csv,
    table,
)

from diffspec.report.files import json_text
from diffspec.results import TraceError
from diffspec.traces import Trace, check, read_trace, template, to_csv
from diffspec.traces.acceptance_counts import acceptance_counts, profiles
from diffspec.traces.formats import FORMATS
from diffspec.traces.gather import Gathered, gather, import_answer
from diffspec.traces.readers.speculation_profile import from_conditional, write
from diffspec.traces.schema import COLUMNS, NAMES, OBSERVABLES
from diffspec.traces.trace import trace_of

FIXTURES = Path(__file__).parent / "fixtures"
SECONDS = 10.0
"""Processor time [s] after which the reading of a small file is called a hang."""
LONGEST = 20_000
"""Longest message of an error [characters]."""


@dataclass(frozen=True)
class Seed:
    """A valid file, columns that its format leaves to the user, and a file to be read with it."""

    data: bytes
    identity: dict[str, Any] = field(default_factory=dict)
    beside: bytes | None = None

    def write(self, path: Path, data: bytes | None = None) -> list[Path]:
        """The files to read: this one, or `data` in its place, at `path`, and what stands beside it."""
        path.write_bytes(self.data if data is None else data)
        if self.beside is None:
            return [path]
        (other := path.with_name(f"beside {path.name}")).write_bytes(self.beside)
        return [path, other]


# Valid files.

AGGREGATE = {"hw": "b200", "framework": "vllm", "model": "org/m", "conc": 8, "isl": 64, "osl": 32, "mean_tpot": 0.01}
CASE = {
    "case": "verify",
    "requests": [
        {"query_len": 4, "kv_len": 1000, "num_draft_tokens": 3, "chunked": False},
        {"query_len": 4, "kv_len": 3000, "num_draft_tokens": 3, "count": 2},
    ],
    "ranks": [
        {"num_tokens": 12, "routing": "real", "latency_us": {"timer": "t", "median": 5e3, "mean": 5.1e3, "count": 20}},
        {"num_tokens": 12, "latency_us": {"median": 5500.0, "count": 20}, "drafter": {"method": "eagle3"}},
    ],
}
SPECULATION = {
    "num_spec_tokens": 3,
    "num_spec_steps": 3,
    "num_draft_tokens": 9,
    "num_accepted_draft_tokens": 3,
    "acceptance_histogram": [1, 1, 1, 0],
    "per_step_drafted": [3, 3, 3],
    "per_step_accepted": [0, 1, 2],
}
METRICS = {"time_to_first_token_ms": 20.0, "generation_time_ms": 400.0, "speculative_decoding": SPECULATION}
RESPONSE = {"id": "a", "choices": [{"text": "x"}], "metrics": METRICS, "usage": {"completion_tokens": 7}}
SGLANG_REQUEST = {
    "text": "x",
    "meta_info": {
        "id": "b",
        "prompt_tokens": 8,
        "completion_tokens": 7,
        "e2e_latency": 0.4,
        "spec_verify_ct": 3,
        "spec_num_proposed_drafts": 9,
        "spec_num_correct_drafts": 3,
    },
}
RAW = [
    {"cell": "c", "asked": {}, "url": "u", "began_unix": 1.0e9},
    {"phase": "measured", "arrival": 0.5, "events": [0.6, 0.7], "error": None, "metrics": METRICS, "task": "code"},
    {"phase": "measured", "arrival": 0.8, "events": [0.9], "error": None, "metrics": METRICS, "temperature": 0.5},
    {"row": {"arrival_rate": 2.0, "prompt_length": 8.0, "output_length": 7.0, "ttft_mean": 0.1}},
]
ARRIVALS = ((0.0, 4808, 10), (0.052, 3180, 8), (1.5, 110, 27))
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:{3 + time:010.7f},{prompt},{output}\n" for time, prompt, output in ARRIVALS
)


def _json(value: Any, **how: Any) -> bytes:
    return json.dumps(value, **how).encode()


def _lines(records: list) -> bytes:
    return b"\n".join(map(_json, records)) + b"\n"


def _parquet(frame: pd.DataFrame) -> bytes:
    target = io.BytesIO()
    frame.to_parquet(target, index=False)
    return target.getvalue()


def request_table(count: int = 200) -> pd.DataFrame:
    """Requests of two runs, one open loop and one closed."""
    arrival = np.arange(count) * 0.5
    return pd.DataFrame(
        {
            "run": ["open", "closed"] * (count // 2),
            "arrival_rate": [2.0, None] * (count // 2),
            "concurrency": [None, 1.0] * (count // 2),
            "arrival_time": arrival,
            "first_token_time": arrival + 0.1,
            "completion_time": arrival + 0.4,
            "prompt_tokens": 50 + np.arange(count) % 7,
            "output_tokens": 4 + np.arange(count) % 3,
            "draft_length": 2,
            "drafted_tokens": 6,
            "accepted_tokens": 2,
            "ok": True,
        }
    )


def _exposition() -> bytes:
    """The first and last scrape of a real series, shortened to what is read."""
    blocks = re.split(r"(?m)^(?=# scrape)", (FIXTURES / "vllm" / "metrics_series.txt").read_text())
    return "".join(block for block in (blocks[1], blocks[-1])).encode()


def _scrapes() -> bytes:
    """Two scrapes between which the 40 requests and 1280 tokens of `VLLM_OPEN` were served."""
    text = """\
# scrape {time}
vllm:generation_tokens_total{{model_name="m"}} {tokens}
vllm:request_success_total{{finished_reason="length",model_name="m"}} {requests}
vllm:num_preemptions_total{{model_name="m"}} 0
vllm:spec_decode_num_drafts_total{{model_name="m"}} {drafts}
vllm:spec_decode_num_draft_tokens_total{{model_name="m"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="m",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="m",position="1"}} {second}
"""
    before = dict(time=50, tokens=1000, requests=30, drafts=100, drafted=200, accepted=90, first=60, second=30)
    after = dict(time=70, tokens=2280, requests=70, drafts=660, drafted=1320, accepted=762, first=508, second=254)
    return (text.format(**before) + text.format(**after)).encode()


def _stream() -> bytes:
    return b"".join(b"data: " + _json(item) + b"\n\n" for item in ({"id": "a", "choices": []}, RESPONSE))


@cache
def seeds() -> dict[str, list[Seed]]:
    """Valid files by the name of their format."""
    plain, points = pd.read_csv(io.StringIO(template())), template().encode()
    open_loop, unspeculated = {"arrival_rate": 2}, {"draft_length": 0, "method": "none"}
    log = pd.DataFrame(ARRIVALS, columns=["arrival_time", "prompt_tokens", "output_tokens"])
    mooncake = [{"timestamp": round(1e3 * t), "input_length": i, "output_length": o} for t, i, o in ARRIVALS]
    bench = FIXTURES / "vllm_bench"
    found: dict[str, list[Seed | bytes]] = {
        "vllm bench serve JSON": [
            _json(VLLM_SPEC),
            _lines([VLLM, VLLM_SPEC | {"mean_itl_ms": 120.0}, VLLM_OPEN]),
            _json([VLLM_OPEN], indent=1),
            (bench / "spec_detailed.json").read_bytes(),
            Seed(_json(VLLM_OPEN), {"draft_length": 2}, beside=_scrapes()),
        ],
        "vllm bench serve JSON in seconds": [Seed(_json(VLLM_SECONDS), unspeculated)],
        "vllm bench sweep summary": [
            sweep_csv([VLLM, VLLM_SPEC | {"mean_itl_ms": 120.0}]).encode(),
            (FIXTURES / "vllm_sweep" / "tiny" / "summary.csv").read_bytes(),
        ],
        "SGLang bench_serving JSON lines": [_lines([SGLANG, SGLANG_2024]), _json([SGLANG])],
        "GuideLLM report": [
            _json(report(benchmark(CONCURRENT), benchmark(POISSON)), indent=1),
            Seed((FIXTURES / "guidellm" / "guidellm_0.5.4.json").read_bytes(), {"draft_length": 4}),
        ],
        "GuideLLM CSV": [table(benchmark(CONCURRENT), benchmark(POISSON)).encode()],
        "InferenceX results": [Seed(_json([AGGREGATE, AGGREGATE | {"metrics": {"mean_ttft": 0.1}}]), unspeculated)],
        "/metrics of vLLM or SGLang": [
            Seed(_exposition(), open_loop),
            Seed(_scrapes(), {"draft_length": 2}, beside=_json(VLLM_OPEN)),
        ],
        "vllm bench forward JSON": [_json([CASE, CASE | {"case": "again"}])],
        "speculation profile": [write(from_conditional([0.8, 0.5, 0.2], "eagle3")).encode()],
        "per-request metrics": [_lines([RESPONSE, SGLANG_REQUEST]), _stream()],
        "raw requests of diffspec collect": [_lines(RAW)],
        "request table": [
            request_table().to_csv(index=False).encode(),
            _parquet(request_table()),
            request_table().to_json(orient="records", lines=True).encode(),
        ],
        "arrivals": [AZURE.encode(), _lines(mooncake), log.to_csv(index=False, sep=";").encode(), _parquet(log)],
        "operating-point table": [points, _parquet(plain), points.replace(b",", b"\t")],
    }
    return {name: [s if isinstance(s, Seed) else Seed(s) for s in items] for name, items in found.items()}


NAMES_OF_FORMATS = tuple(item.name for item in FORMATS)


# What is put in the place of a value.

DEEP = 3000
# Texts that stand for a value of JSON as they are, and texts that are none.
RAW_JSON = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "5e-324", "-0", "-0.0", "-1", "0", "0.0", "1e-400"),
    *("9" * 25, "1e12", "1e-12", "123456789", "0.5", "1", "true", "false", "null", '""', '"NaN"', '"inf"', '"-1"'),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u2028"', '"1e400"', '"8"', "[]", "{}", "[null]", '{"":null}'),
    *("[1e400]", "[-1, 2]", "[[1],[2]]", "[0.5, NaN]", '["a"]', '{"mean": 1}', '{"successful": {"mean": -1}}', "1.0"),
    *('{"a":1,"a":2}', '"\\u001b[31m"', '"a\\nb"', "[0.9,0.5,0.1]", "[" * 50 + "]" * 50, '"' + "x" * 5000 + '"'),
)
BROKEN_JSON = (
    *("", "0x10", "'a'", "1,", "}", "[", '"', '"\x00"', '"\x1b"', "nul", "1e", "+1", "9" * 5000),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
)
CELLS = (
    *("", " ", "nan", "NaN", "inf", "-inf", "1e400", "-1", "0", "-0", "1e-320", "1e308", "9" * 400, "9" * 20, "0.5"),
    *("1", "12", "1e3", "1e12", "true", "None", "null", "[1, 2]", "[0.9;0.5]", "0.9;0.5", ";", "{'a': 1}", "abc", '"'),
    *("'", "=1+1", "1,5", "1;5", "5 ms", "50%", "\u0661", "\u2212" + "1", "\x00", "\x1b[31m", "x" * 200_000, "é"),
    *("open", "none", "tree", "constant", "poisson", "gamma", "2026-01-01 00:00:00", "9999-12-31", "a\nb", "(((("),
)
JUNK = (
    *(b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe2\x80\xa8", b"\r", b"\n"),
    *(b"\n\n", b'"', b"'", b"{", b"}", b"[", b"]", b",", b";", b"\t", b"\\", b"\\u", b"1", b"-", b"e9", b"#", b"PAR1"),
    *(b"\x1a", b"\x85", b" " * 5000, b"[" * 5000, b'{"a":' * 5000, b"# scrape 5\n", b"data: {}\n", b"x" * 70_000),
)


class Mutator:
    """Changes drawn from one seed."""

    def __init__(self, name: str, number: int):
        self.random = random.Random(f"{name} {number}")

    def bytes(self, data: bytes) -> bytes:
        """One change of the bytes as such."""
        draw = self.random
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 1, 2, 8, 64, 1000)))
        choice = draw.randrange(11)
        if choice == 0:
            changed = bytearray(data)
            for _ in range(draw.choice((1, 1, 3, 20))):
                changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        if choice == 1:
            return data[:start]
        if choice == 2:
            return data[:start] + data[end:]
        if choice == 3:
            return data[:end] + data[start:end] * draw.choice((1, 1, 3, 100)) + data[end:]
        if choice == 4:
            other = draw.choice([seed.data for items in seeds().values() for seed in items])
            cut = draw.randrange(len(other) + 1)
            return draw.choice((data[:start] + other[cut:], data + other, data[:start] + other[:4000] + data[end:]))
        if choice == 5:
            return data.replace(b"\n", draw.choice((b"\r\n", b"\r", b"\n\n", b"\x0b")), draw.choice((-1, 2)))
        if choice == 6 and draw.random() < 0.3:
            text = data.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-le")))
            return draw.choice((text, gzip.compress(data, mtime=0), b"", b"\n"))
        if choice == 7:
            return data[start:]
        return data[:start] + draw.choice(JUNK) + data[end if draw.random() < 0.5 else start :]

    def json(self, data: bytes) -> bytes:
        """One change of a JSON value, key, or record; where the file is no JSON, of its bytes."""
        draw = self.random
        shape, records = _parsed(data)
        if not records:
            return self.bytes(data)
        choice = draw.randrange(12)
        if choice == 0:
            records.insert(draw.randrange(len(records) + 1), draw.choice(records))
        elif choice == 1:
            records.pop(draw.randrange(len(records)))
        elif choice == 2:
            records[draw.randrange(len(records))] = draw.choice([3, None, "text", [], {}, [[]], {"a": 1}, True, -1.5])
        elif choice == 3:
            other = draw.choice([seed for items in seeds().values() for seed in items])
            records += _parsed(other.data)[1]
        elif choice == 4:
            shape = draw.choice(("object", "list", "lines"))
        spots = list(_spots(records))
        raw: list[str] = []
        for _ in range(draw.choice((1, 1, 1, 2, 4)) if spots else 0):
            holder, key = draw.choice(spots)
            kind = draw.randrange(12)
            try:
                if kind < 5:
                    holder[key] = f"@raw{len(raw)}@"
                    raw.append(draw.choice(RAW_JSON if kind else BROKEN_JSON))
                elif kind == 5:
                    del holder[key]
                elif kind == 6:
                    other, at = draw.choice(spots)
                    holder[key] = copy.deepcopy(other[at])
                elif kind == 7 and isinstance(holder, dict):
                    new = draw.choice(("", "x", str(key).upper(), str(key)[:-3], "a" * 300, "\u202e"))
                    holder[new] = holder.pop(key)
                elif kind == 8:
                    value = holder[key]
                    holder[key] = draw.choice(([value], {"value": value}, str(value), [value] * 3))
                elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
                    holder[key] = holder[key] * draw.choice((-1, 0, 1e3, 1e-3, 1e6, 1e-6, 1e30, 1e-30, 1.5))
            except (KeyError, IndexError):  # an earlier change took it away
                continue
        return _dumped(shape, records, raw)

    def table(self, data: bytes) -> bytes:
        """One change of cells, rows or columns; where the file is no table, of its bytes."""
        draw = self.random
        text = data.decode("utf-8", "replace")
        comma = max(",\t;", key=text.split("\n", 1)[0].count)
        usual = csv.field_size_limit(1 << 30)
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=comma) if row]
        except csv.Error:
            return self.bytes(data)
        finally:
            csv.field_size_limit(usual)  # readers go by it
        if not rows or len(rows) > 1000:
            return self.bytes(data)
        at = draw.randrange(max(map(len, rows)))
        choice = draw.randrange(13)
        if choice < 6:
            for _ in range(draw.choice((1, 1, 2, 5))):
                row = draw.choice(rows[1:] or rows)
                row[draw.randrange(len(row))] = draw.choice(CELLS)
        elif choice == 6:
            rows = [[*row[:at], *row[at + 1 :]] for row in rows]
        elif choice == 7:
            rows = [[*row[:at], *row[at : at + 1] * 2, *row[at + 1 :]] for row in rows]
        elif choice == 8:
            rows[0][at % len(rows[0])] = draw.choice((*NAMES, *draw.choice(rows), "", "x", "é"))
        elif choice == 9:
            draw.choice(rows).insert(at, draw.choice(CELLS))
        elif choice == 10:
            row = draw.choice(rows)
            del row[draw.randrange(len(row)) :]
        elif choice == 11:
            draw.shuffle(rows)
        else:
            value = draw.choice(CELLS[:40])
            rows = [rows[0], *([*row[:at], value, *row[at + 1 :]] for row in rows[1:])]
        out = io.StringIO(newline="")
        comma = draw.choice((",", ";", "\t", "|")) if draw.random() < 0.1 else comma
        try:
            csv.writer(out, delimiter=comma, lineterminator=draw.choice(("\n", "\n", "\r\n"))).writerows(rows)
        except csv.Error:
            return self.bytes(data)
        return out.getvalue().encode("utf-8", "replace")

    def lines(self, data: bytes) -> bytes:
        """One change of a line, or of a number or word in it."""
        draw = self.random
        lines = data.decode("utf-8", "replace").split("\n")
        at = draw.randrange(len(lines))
        choice = draw.randrange(10)
        if choice == 0:
            del lines[at]
        elif choice == 1:
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif choice == 2:
            draw.shuffle(lines)
        elif choice == 3:
            lines = [*lines[at:], *lines[:at]]
        else:
            for _ in range(draw.choice((1, 1, 3, 10))):
                at = draw.randrange(len(lines))
                found = list(re.finditer(r'[-+.\w]+|"[^"]*"', lines[at]))
                if found:
                    word = draw.choice([*found, *found[-1:] * 3])
                    new = draw.choice((*RAW_JSON, *CELLS, "1e15", "+Inf"))
                    lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]
        return "\n".join(lines).encode("utf-8", "replace")

    def parquet(self, data: bytes) -> bytes:
        """One change of a column's type, name or values; where the file is no Parquet any more, of its bytes."""
        draw = self.random
        try:
            held = pq.read_table(io.BytesIO(data))
            names, columns = list(held.schema.names), [column.to_pylist() for column in held.columns]
        except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError):
            return self.bytes(data)
        if not names or not len(columns[0]):
            return self.bytes(data)
        at, size = draw.randrange(len(names)), len(columns[0])
        choice, target = draw.randrange(9), io.BytesIO()
        arrays: list[Any] = [_array(values) for values in columns]
        if choice < 4:
            arrays[at] = draw.choice(_TYPED)(columns[at])
        elif choice == 4:
            names[at] = draw.choice((*names, *NAMES, "", " ", "\x00", "é", "__index_level_0__", "x" * 300))
        elif choice == 5:
            values = list(columns[at])
            values[draw.randrange(size)] = draw.choice((None, math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 1e-300))
            arrays[at] = _array(values)
        elif choice == 6:
            del names[at], arrays[at]
        elif choice == 7:
            keep = pa.array(draw.choices(range(size), k=draw.choice((0, 1, size, 3 * size))), pa.int64())
            arrays = [array.take(keep) for array in arrays]
        else:
            return self.bytes(data)
        try:
            pq.write_table(pa.Table.from_arrays(arrays, names=names), target)
        except (pa.ArrowException, NotImplementedError):
            return self.bytes(data)
        return target.getvalue()

    def change(self, data: bytes) -> bytes:
        """One change of a kind that the file's content suggests."""
        if not data or self.random.random() < 0.2:
            return self.bytes(data) if data else b"\x00"
        start = data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if data.startswith(b"PAR1"):
            return self.parquet(data)
        if start in (b"{", b"["):
            return self.json(data)
        text = start in (b"#", b"d") or b"vllm:" in data[:200]
        return (self.lines if text or self.random.random() < 0.1 else self.table)(data)


def _array(values: list) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([str(value) for value in values])


_TYPED: tuple[Callable[[list], Any], ...] = (
    lambda values: pa.array([str(value) for value in values]),
    lambda values: pa.array([str(value) for value in values]).dictionary_encode(),
    lambda values: pa.array([str(value).encode() for value in values]),
    lambda values: pa.array([b"\xff\xfe"] * len(values)),
    lambda values: pa.array([[1.0, None]] * len(values)),
    lambda values: pa.array([{"a": 1}] * len(values)),
    lambda values: pa.array([None] * len(values)),
    lambda values: pa.array([True] * len(values)),
    lambda values: pa.array([2**63] * len(values), pa.uint64()),
    lambda values: pa.array([-(2**62)] * len(values)),
    lambda values: pa.array([10**17] * len(values), pa.timestamp("us")),
    lambda values: pa.array([2**62] * len(values), pa.timestamp("s")),
    lambda values: pa.array(range(len(values)), pa.timestamp("ns", "UTC")),
    lambda values: pa.array(range(len(values)), pa.duration("ms")),
    lambda values: pa.array(range(len(values)), pa.date32()),
    lambda values: pa.array(range(len(values)), pa.time64("us")),
    lambda values: pa.array(range(len(values)), pa.int16()),
    lambda values: pa.array(range(len(values))).cast(pa.decimal128(20, 1)),
    lambda values: pa.array(np.arange(len(values)), pa.float16()),
    lambda values: pa.array([math.nan] * len(values)),
    lambda values: pa.array([math.inf] * len(values)),
    lambda values: pa.array(["x" * 200_000] * len(values)),
    lambda values: pa.array([""] * len(values)),
    lambda values: pa.array([f"run {index}" for index in range(len(values))], pa.large_string()),
)


def _parsed(data: bytes) -> tuple[str, list]:
    """The shape of a JSON file and its records; no records where it is none."""
    try:
        text = data.decode("utf-8-sig")
        try:
            value = json.loads(text)
            return ("list", value) if isinstance(value, list) else ("object", [value])
        except json.JSONDecodeError:
            return "lines", [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return "none", []


def _spots(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    if depth > 30:
        return
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _spots(value[key], depth + 1)


def _dumped(shape: str, records: list, raw: list[str]) -> bytes:
    if shape == "lines":
        text = "\n".join(map(json.dumps, records)) + "\n"
    else:
        text = json.dumps(records if shape == "list" or len(records) != 1 else records[0])
    for index, value in enumerate(raw):
        text = text.replace(f'"@raw{index}@"', value)
    return text.encode("utf-8", "surrogatepass")


def mutation(name: str, number: int) -> tuple[Seed, bytes]:
    """The valid file that a mutation of a format starts from, and the bytes that come of it."""
    mutator = Mutator(name, number)
    seed = mutator.random.choice(seeds()[name])
    data = seed.data
    for _ in range(mutator.random.choice((1, 1, 1, 2, 3))):
        data = mutator.change(data)
    return seed, data


# What a reader may do with a file.


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when the block takes more processor time than that."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"still reading after {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(paths: list[Path], identity: dict[str, Any], whole: bool = True) -> str:
    """ "accepted", "skipped" (accepted without its bad rows) or "refused"; `AssertionError`, or whatever the reader
    raised, for anything else. `whole`: also what takes long, the acceptance of points and writing a trace."""
    outcome, gathered, trace = "accepted", None, None
    try:
        with within(SECONDS):
            gathered = gather(paths)
            if gathered.points:
                trace = trace_of(gathered, identity=identity)
    except TraceError as error:
        assert_clear(error, paths[0])
        if gathered is None:
            return "refused"
        try:
            trace = trace_of(gathered, skip_bad_rows=True, identity=identity)
        except TraceError as again:
            assert_clear(again, paths[0])
            return "refused"
        assert trace.bad_rows is not None and len(trace.bad_rows) and trace.bad_rows["problem"].str.len().all()
        trace.bad_rows.to_csv(index=False).encode()
        outcome = "skipped"
    with within(SECONDS):
        answer = json_text(import_answer(gathered, trace, None if trace is None else check(trace)))
        for line in gathered.warnings if trace is None else trace.warnings:
            assert len(line.encode()) < LONGEST and "\x00" not in line
        for item in json.loads(answer)["arrivals"]:
            assert item["n_requests"] >= 1 and item["duration"] is not None
            assert all(value is None or value >= 0 for key, value in item.items() if key != "file")
        if trace is not None:
            assert_valid(trace)
        if trace is None or (whole and outcome == "accepted"):
            assert_acceptance(gathered)
        if trace is not None and whole:
            (again := paths[0].with_name("again.csv")).write_text(to_csv(trace.frame), encoding="utf-8")
            assert read_trace(again).digest() == trace.digest(), "the trace differs once it is written and read"
    return outcome


def assert_clear(error: TraceError, path: Path) -> None:
    """The file is named, in a message that a terminal can show."""
    assert path.name in str(error), f"the file is not named: {str(error)[:300]}"
    assert len(str(error).encode()) < LONGEST, f"a message of {len(str(error))} characters"


def assert_acceptance(gathered: Gathered) -> None:
    """Counts that can have happened and rates that are probabilities."""
    for item in acceptance_counts(gathered):
        assert item.accepted.shape == item.reached.shape and np.isfinite(item.reached).all()
        assert (item.accepted >= 0).all() and (item.accepted <= item.reached * (1 + 1e-9)).all()
        assert all(len(values) == len(item.accepted) for values in item.labels.values())
    for profile in profiles(gathered):
        assert all(0 <= rate <= 1 for rate in (*profile.conditional, *profile.marginal))
        assert len(profile.conditional) == len(profile.marginal) == profile.num_speculative_tokens
        assert 1 <= profile.tokens_per_step <= 1001
        write(profile).encode()


def assert_valid(trace: Trace) -> None:
    """Every cell missing or within the range of its column, and every row an operating point."""
    frame = trace.frame
    assert len(frame) and set(NAMES) <= set(frame.columns)
    for item in COLUMNS:
        cells = frame[item.name]
        if item.dtype in ("number", "integer"):
            values = cells.to_numpy(float)
            values = values[~np.isnan(values)]
            low = values > item.low if item.low_open else values >= item.low
            assert (low & (values <= item.high)).all(), f"{item.name}: {values}"
            assert item.dtype != "integer" or (values == np.floor(values)).all(), item.name
        elif item.dtype == "list":
            assert all(cell is None or (cell and all(0 <= rate <= 1 for rate in cell)) for cell in cells)
        else:
            assert all(cell is None or (type(cell) is str and cell and cell == cell.strip()) for cell in cells)
    for name in ("prompt_length", "output_length", "draft_length"):
        assert frame[name].notna().all(), name
    assert (frame["arrival_rate"].notna() ^ frame["concurrency"].notna()).all()
    assert frame[list(OBSERVABLES)].notna().any(axis=1).all()
    assert all(type(file) is str for file in frame["source_file"]) and (frame["source_row"] >= 1).all()
