"""The operating-point table as data: one row is one benchmark run at one operating point.

Everything that reads, checks, writes or documents the table asks `COLUMNS`. Units are seconds, tokens, bytes and
requests throughout; a missing value is an empty cell.
"""

import math
from dataclasses import dataclass

KINDS = ("identity", "architecture", "load", "shape", "speculation", "observed")
METHODS = ("none", "draft_model", "eagle", "eagle3", "mtp", "block", "ngram", "suffix", "tree")
METHOD_ALIASES = {
    "dflash": "block",
    "dspark": "block",
    "pard": "block",
    "ngram_gpu": "ngram",
    "n_gram": "ngram",
    "nextn": "mtp",
    "standalone": "draft_model",
}
ARRIVAL_PROCESSES = ("poisson", "constant", "gamma", "burst")
WINDOWS = ("run", "steady")
METRICS = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = ("p50", "p90", "p95", "p99")
STATISTICS = ("mean", *PERCENTILES)
RESERVED = ("source_file", "source_row", "problem")
DEFAULT_DEPLOYMENT = "default"


@dataclass(frozen=True)
class Column:
    """One column of the operating-point table.

    `name`; `kind`, one of `KINDS`; `unit` ("s", "tok", "req/s", "1" for a ratio, "" for text); `low` and `high`, the
    smallest and largest values allowed (`low` itself is excluded when `low_open`); `meaning`; `dtype`: "number",
    "integer", "text" or "list" (numbers joined by semicolons); `choices`, the allowed texts, empty for free text.

    >>> column("ttft_mean").allowed
    'above 0, up to 3600 s'
    """

    name: str
    kind: str
    unit: str
    low: float
    high: float
    meaning: str
    dtype: str = "number"
    low_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What the column accepts, in words."""
        if self.dtype == "text":
            return "one of " + ", ".join(self.choices) if self.choices else "text"
        whole = "a whole number " if self.dtype == "integer" else ""
        unit = "" if self.unit in ("", "1") else f" {self.unit}"
        low = f"above {self.low:g}, up to" if self.low_open else f"{self.low:g} to"
        if math.isinf(self.high):
            return f"{whole}{'above' if self.low_open else 'at least'} {self.low:g}{unit}"
        each = ", numbers joined by semicolons" if self.dtype == "list" else ""
        return f"{whole}{low} {self.high:g}{unit}{each}"


def _text(name: str, kind: str, meaning: str, choices: tuple[str, ...] = ()) -> Column:
    return Column(name, kind, "", -math.inf, math.inf, meaning, "text", choices=choices)


def _positive(name: str, kind: str, unit: str, high: float, meaning: str, dtype: str = "number") -> Column:
    return Column(name, kind, unit, 0.0, high, meaning, dtype, low_open=True)


def _from_zero(name: str, kind: str, unit: str, high: float, meaning: str, dtype: str = "number") -> Column:
    return Column(name, kind, unit, 0.0, high, meaning, dtype)


# Longest plausible value of each latency [s]. Above it the number is taken for milliseconds: a gap between two tokens
# of 20 s, a first token after an hour or a request of a day is no interactive serving measurement.
LONGEST = {"ttft": 3600.0, "itl": 20.0, "tpot": 20.0, "e2e": 86400.0}
_METRIC_MEANING = {
    "ttft": "time to first token, from arrival",
    "itl": "gap between stream events (one per engine step)",
    "tpot": "(completion - first token) / (output tokens - 1)",
    "e2e": "completion - arrival",
}


def _latencies() -> list[Column]:
    columns = []
    for metric in METRICS:
        for statistic in STATISTICS:
            name, meaning = f"{metric}_{statistic}", f"{statistic} of {_METRIC_MEANING[metric]}"
            make = _positive if statistic == "mean" else _from_zero
            columns.append(make(name, "observed", "s", LONGEST[metric], meaning))
    return columns


COLUMNS: tuple[Column, ...] = (
    _text("deployment", "identity", "rows with one value share one set of fitted parameters"),
    _text("run", "identity", "name of the benchmark run"),
    _text("engine", "identity", "serving engine and version"),
    _text("hardware", "identity", "accelerator and count"),
    _text("verifier", "identity", "the large model"),
    _text("drafter", "identity", "the drafting model or head"),
    _text("workload", "identity", "data set or traffic"),
    _positive("num_experts", "architecture", "1", 1e5, "experts per MoE layer", "integer"),
    _positive("experts_per_token", "architecture", "1", 1e5, "experts a token is routed to", "integer"),
    _positive("expert_ranks", "architecture", "1", 1e5, "ranks the experts are spread over", "integer"),
    _positive("verifier_params", "architecture", "1", 1e15, "parameters of the verifier"),
    _positive("drafter_params", "architecture", "1", 1e15, "parameters of the drafter"),
    _positive("kv_bytes_per_token", "architecture", "B", 1e9, "KV-cache bytes per token of context"),
    _positive("drafter_layers", "architecture", "1", 1e4, "layers of the drafter", "integer"),
    _positive("arrival_rate", "load", "req/s", 1e6, "mean arrivals per second (open loop)"),
    _positive("concurrency", "load", "req", 1e6, "requests kept in flight (closed loop)"),
    _text("arrival_process", "load", "how requests arrive (open loop)", ARRIVAL_PROCESSES),
    _from_zero("arrival_scv", "load", "1", 1e6, "squared coefficient of variation of the gaps between arrivals"),
    _positive("max_batch_size", "load", "req", 1e6, "most requests in one engine step", "integer"),
    _positive("kv_capacity_tokens", "load", "tok", 1e12, "tokens the KV cache holds"),
    _positive("max_batched_tokens", "load", "tok", 1e9, "most tokens in one engine step"),
    _positive("prompt_length", "shape", "tok", 1e8, "mean prompt length"),
    Column("output_length", "shape", "tok", 1.0, 1e8, "mean output length"),
    _from_zero("prompt_scv", "shape", "1", 1e6, "squared coefficient of variation of prompt lengths"),
    _from_zero("output_scv", "shape", "1", 1e6, "squared coefficient of variation of output lengths"),
    _text("method", "speculation", "how drafts are made", METHODS),
    _from_zero("draft_length", "speculation", "tok", 1000.0, "drafted tokens per step, 0 for none", "integer"),
    _text("rejection", "speculation", "how drafts are verified, such as standard or synthetic"),
    Column("tokens_per_step", "speculation", "tok", 1.0, 1001.0, "tokens emitted per drafting step, bonus included"),
    _from_zero("acceptance_rate", "speculation", "1", 1.0, "P(next draft token accepted, given all before it were)"),
    _from_zero("position_acceptance", "speculation", "1", 1.0, "the same for each draft position", "list"),
    _from_zero("draft_acceptance_rate", "speculation", "1", 1.0, "accepted / drafted tokens, as engines log it"),
    _from_zero("draft_probability", "speculation", "1", 1.0, "share of steps in which the drafter drafts at all"),
    _from_zero("temperature", "speculation", "1", 100.0, "sampling temperature"),
    _text("task", "speculation", "kind of text, such as code or chat"),
    *_latencies(),
    _positive("throughput", "observed", "req/s", 1e6, "completed requests per second"),
    _text("window", "observed", "what was averaged: a whole run from empty to drained, or a steady part", WINDOWS),
    _positive("offered_rate", "observed", "req/s", 1e6, "arrivals per second in the window, as they happened"),
    _positive("n_requests", "observed", "req", 1e12, "completed requests measured", "integer"),
    _from_zero("failed", "observed", "req", 1e12, "requests that failed", "integer"),
    _positive("effective_batch_size", "observed", "req", 1e6, "mean requests in the system"),
    _from_zero("waiting_mean", "observed", "req", 1e9, "mean requests waiting for a place in the batch"),
    _from_zero("kv_usage_mean", "observed", "1", 1.0, "mean share of the KV cache in use"),
    _from_zero("preemptions", "observed", "1", 1e12, "requests pushed out of the batch and redone"),
    Column("load_imbalance", "observed", "1", 1.0, 1e5, "largest / mean load of an expert rank"),
)

_BY_NAME = {item.name: item for item in COLUMNS}
NAMES: tuple[str, ...] = tuple(_BY_NAME)
TEXT_NAMES: tuple[str, ...] = tuple(item.name for item in COLUMNS if item.dtype == "text")
NUMBER_NAMES: tuple[str, ...] = tuple(item.name for item in COLUMNS if item.dtype in ("number", "integer"))
# A row needs at least one of these: something a model can be compared with.
OBSERVABLES: tuple[str, ...] = (*(f"{metric}_{stat}" for metric in METRICS for stat in STATISTICS), "throughput")


def column(name: str) -> Column:
    """The column called `name`; `KeyError` when the table has none."""
    return _BY_NAME[name]


_TEMPLATE = """\
deployment,run,engine,hardware,verifier,drafter,method,draft_length,arrival_rate,arrival_process,concurrency,\
max_batch_size,prompt_length,output_length,tokens_per_step,position_acceptance,n_requests,failed,throughput,\
ttft_mean,ttft_p99,itl_mean,itl_p99,tpot_mean,tpot_p99,e2e_mean,e2e_p99
my-deployment,plain at 2 req/s,my engine 1.0,1 my accelerator,my-verifier,,none,0,2,poisson,,64,256,128,,,400,0,1.98,\
0.08,0.21,0.0240,0.0410,0.0240,0.0330,3.128,4.39
my-deployment,k=4 at 2 req/s,my engine 1.0,1 my accelerator,my-verifier,my-drafter,draft_model,4,2,poisson,,64,256,\
128,3.11,0.81;0.74;0.70;0.68,400,0,1.99,0.09,0.24,0.0317,0.0520,0.0103,0.0150,1.398,2.01
my-deployment,plain at 8 in flight,my engine 1.0,1 my accelerator,my-verifier,,none,0,,,8,64,256,128,,,400,0,2.38,\
0.19,0.52,0.0250,0.0430,0.0250,0.0340,3.365,4.10
my-deployment,k=4 at 8 in flight,my engine 1.0,1 my accelerator,my-verifier,my-drafter,draft_model,4,,,8,64,256,128,\
3.11,0.81;0.74;0.70;0.68,400,0,4.75,0.16,0.48,0.0366,0.0640,0.0119,0.0180,1.671,2.26
"""


def template() -> str:
    """A small valid table as CSV text: open-loop and closed-loop rows, plain and with four drafted tokens.

    Times are in seconds. Overwrite the rows with your measurements; leave what you do not know empty.

    >>> template().splitlines()[0].split(",")[:3]
    ['deployment', 'run', 'engine']
    """
    return _TEMPLATE
