"""Routing histograms and traces: how often each expert of each layer was chosen, from a file.

* ``.npz`` with ``counts`` [experts] or [layers, experts]: tokens routed to each expert; and, where it is known,
  ``tokens``: how many were routed in each layer
* ``.npz`` with ``experts`` [tokens, experts_per_token] or [layers, tokens, experts_per_token]: the experts that each
  token chose, numbered from 0; and ``num_experts``, for those that none chose
* ``.npz`` or ``.json`` with ``logical_count`` [layers, experts] or [steps, layers, experts], the name that SGLang's
  recorder of expert distributions gives them
* ``.csv`` or ``.parquet`` with the columns ``expert`` and ``count``, and ``layer`` where there are several
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..results import InputError
from .json_text import parse_json
from .table import decode, file_name, read_bytes

KEYS = ("counts", "experts", "logical_count")
MOST_CELLS = 1 << 28


@dataclass(frozen=True)
class RoutingCounts:
    """Tokens routed to each expert: ``counts`` [layers, experts] (one layer where the file tells none apart),
    ``tokens`` routed in each layer, and ``experts_per_token``; both None where the file does not tell them."""

    file: str
    counts: np.ndarray
    tokens: float | None = None
    experts_per_token: float | None = None

    def popularity(self, num_experts: int, experts_per_token: float) -> np.ndarray:
        """P(a token routes to an expert) [layers, experts]: p_e = m*counts_e/sum(counts), so that each layer sums to m.

        Errors: :class:`InputError` where the file has other experts than the model, or an expert with more tokens than
        there were.

        >>> RoutingCounts("x.npz", np.array([[30.0, 10.0, 20.0, 20.0]])).popularity(4, 2)
        array([[0.75, 0.25, 0.5 , 0.5 ]])
        """
        if self.counts.shape[1] != num_experts:
            raise InputError(
                f"{self.file}: got {self.counts.shape[1]} experts; allowed: {num_experts}, as the model has"
            )
        told = self.experts_per_token
        if told is not None and abs(told - experts_per_token) > 1e-3 * experts_per_token:
            raise InputError(
                f"{self.file}: got {told:g} experts per token; allowed: {experts_per_token:g}, as the model has"
            )
        shares = experts_per_token * self.counts / self.counts.sum(axis=1, keepdims=True)
        layer, expert = np.unravel_index(int(np.argmax(shares)), shares.shape)
        if shares[layer, expert] > 1.01:
            raise InputError(
                f"{self.file}: layer {layer}, expert {expert}: got {shares[layer, expert]:.3g} times as many tokens as "
                f"there were, if each goes to {experts_per_token:g} experts; allowed: up to 1"
            )
        return np.minimum(shares, 1.0)


def read_routing(path: str | Path) -> RoutingCounts:
    """Read a routing histogram or trace; the table of the module tells the formats.

    Errors: :class:`InputError` for a file that is missing or unreadable, unknown keys, counts that are negative or no
    numbers, a layer without tokens, or a token that goes to one expert twice.
    """
    file, suffix = file_name(path), Path(path).suffix.lower()
    if suffix == ".npz":
        arrays = _arrays(read_bytes(path), file)
    elif suffix == ".json":
        records = [value for _, value in parse_json(decode(read_bytes(path), file), file)]
        if len(records) != 1 or not isinstance(records[0], dict):
            raise InputError(f"{file}: got no single object; allowed: an object with logical_count")
        arrays = records[0]
    elif suffix in (".csv", ".parquet"):
        return RoutingCounts(file, _tabled(_frame(path, suffix, file), file))
    elif suffix in (".pt", ".pth"):
        raise InputError(
            f"{file}: PyTorch files are not read; save its logical_count as .npz: "
            "numpy.savez('routing.npz', logical_count=torch.load(FILE)['logical_count'].numpy())"
        )
    else:
        raise InputError(f"{file}: got a {suffix or 'nameless'} file; allowed: .npz, .json, .csv, .parquet")
    return _counted(arrays, file)


def _arrays(data: bytes, file: str) -> dict[str, np.ndarray]:
    try:
        opened = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an archive of named ones")
        with opened:
            return {name: opened[name] for name in opened.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{file}: not an .npz file of plain arrays ({error}); write it with numpy.savez") from None


def _counted(arrays: Mapping[str, Any], file: str) -> RoutingCounts:
    found = [name for name in KEYS if name in arrays]
    if len(found) != 1:
        got = ", ".join(map(str, arrays)) or "nothing"
        raise InputError(f"{file}: got {got}; allowed: exactly one of {', '.join(KEYS)}")
    (key,) = found
    values = _numbers(arrays[key], file, key)
    if key == "experts":
        return _from_choices(values, _scalar(arrays, "num_experts", file), file)
    if key == "logical_count" and values.ndim == 3:
        values = values.sum(axis=0)
    if values.ndim not in (1, 2):
        raise InputError(f"{file}: {key}: got shape {values.shape}; allowed: [experts] or [layers, experts]")
    counts = _checked(np.atleast_2d(values), file, key)
    tokens = _scalar(arrays, "tokens", file)
    told = None if tokens is None else counts.sum(axis=1) / tokens
    if told is not None and np.ptp(told) > 1e-3 * told.max():
        raise InputError(f"{file}: tokens: got {tokens:g}, but layers have {told.min():.3g} to {told.max():.3g} each")
    return RoutingCounts(file, counts, tokens, None if told is None else float(told[0]))


def _from_choices(ids: np.ndarray, num_experts: float | None, file: str) -> RoutingCounts:
    if ids.ndim not in (2, 3) or not ids.size:
        allowed = "[tokens, experts_per_token] or [layers, tokens, experts_per_token]"
        raise InputError(f"{file}: experts: got shape {ids.shape}; allowed: {allowed}")
    ids = ids[None] if ids.ndim == 2 else ids
    most = int(ids.max()) + 1 if num_experts is None else int(num_experts)
    if np.any(ids != np.floor(ids)) or ids.min() < 0 or ids.max() >= most:
        raise InputError(
            f"{file}: experts: got {ids.min():g} to {ids.max():g}; allowed: whole numbers from 0 to {most - 1}"
        )
    ordered = np.sort(ids, axis=-1)
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))
    if len(twice):
        layer, token = twice[0]
        raise InputError(f"{file}: experts: layer {layer}, token {token} goes to one expert twice; allowed: once")
    counts = np.stack([np.bincount(layer.ravel().astype(np.int64), minlength=most) for layer in ids]).astype(float)
    return RoutingCounts(file, counts, float(ids.shape[1]), float(ids.shape[2]))


def _frame(path: str | Path, suffix: str, file: str) -> pd.DataFrame:
    data = read_bytes(path)
    try:
        if suffix == ".parquet":
            return pd.read_parquet(io.BytesIO(data))
        return pd.read_csv(io.StringIO(decode(data, file)))
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise InputError(f"{file}: not a table ({str(error).splitlines()[0]})") from None


def _tabled(frame: pd.DataFrame, file: str) -> np.ndarray:
    missing = [name for name in ("expert", "count") if name not in frame.columns]
    if missing:
        raise InputError(f"{file}: no column {' and no column '.join(missing)}; allowed: expert, count and layer")
    names = [name for name in ("layer", "expert", "count") if name in frame.columns]
    columns = {name: _numbers(frame[name].to_numpy(), file, name) for name in names}
    where = [columns.get("layer", np.zeros(len(frame))), columns["expert"]]
    for name, values in zip(("layer", "expert"), where, strict=True):
        if np.any(values != np.floor(values)) or values.min() < 0 or values.max() > 1e5:
            raise InputError(f"{file}: {name}: allowed: whole numbers from 0 to 100000")
    _, layer = np.unique(where[0], return_inverse=True)
    expert = where[1].astype(np.int64)
    counts = np.zeros((layer.max() + 1, expert.max() + 1))
    np.add.at(counts, (layer, expert), columns["count"])
    return _checked(counts, file, "count")


def _numbers(values: Any, file: str, key: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        array = array.astype(float) if array.dtype.kind in "iufbO" else np.asarray(array, dtype=float)
    except (ValueError, TypeError):
        raise InputError(f"{file}: {key}: got something else; allowed: an array of numbers") from None
    if array.size > MOST_CELLS:
        raise InputError(f"{file}: {key}: got {array.size} numbers; allowed: up to {MOST_CELLS}")
    if not array.size or not np.all(np.isfinite(array)):
        raise InputError(f"{file}: {key}: got {'nothing' if not array.size else 'NaN or inf'}; allowed: finite numbers")
    return array


def _checked(counts: np.ndarray, file: str, key: str) -> np.ndarray:
    if counts.min() < 0:
        raise InputError(f"{file}: {key}: got {counts.min():g}; allowed: 0 or more")
    empty = np.flatnonzero(counts.sum(axis=1) <= 0)
    if len(empty):
        raise InputError(f"{file}: {key}: layer {empty[0]} has no tokens; leave dense layers out")
    return counts


def _scalar(arrays: Mapping[str, Any], name: str, file: str) -> float | None:
    if name not in arrays:
        return None
    value = _numbers(arrays[name], file, name)
    if value.size != 1 or float(value.ravel()[0]) <= 0:
        raise InputError(f"{file}: {name}: got shape {value.shape}; allowed: one number above 0")
    return float(value.ravel()[0])
