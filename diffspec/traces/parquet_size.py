"""How much a Parquet file holds once it is unpacked, told from its footer: a few bytes may stand for gigabytes."""

from collections.abc import Collection
from typing import Any

from .problems import Problem

MOST_CHUNK = 256 << 20
"""Largest column of a row group, unpacked [B]: it is held whole."""


def check_parquet(metadata: Any, file: str, size: int, columns: Collection[str] | None = None) -> int:
    """How many values the `columns` (all of them: None) of a file of `size` bytes hold. Raises `TraceError` for a
    column too large to be unpacked, and, where columns are named, for more rows than bytes beyond a million (the times
    of requests differ: a row takes a byte at least) and for lists in the place of numbers."""
    if columns is not None and metadata.num_rows > max(size, 1 << 20):
        raise Problem("more rows than bytes", file, None, None, f"{metadata.num_rows} rows in {size} bytes").error()
    held = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(metadata.num_columns):
            chunk = group.column(place)
            name = chunk.path_in_schema.split(".", 1)[0].strip()
            if columns is not None and name not in columns:
                continue
            held += chunk.num_values
            if chunk.total_uncompressed_size > MOST_CHUNK:
                got, allowed = f"{chunk.total_uncompressed_size} bytes", f"up to {MOST_CHUNK >> 20} MiB in a row group"
                raise Problem("too much to unpack", file, None, name, got, allowed).error()
            if columns is not None and chunk.num_values > group.num_rows:
                raise Problem("lists in the place of single values", file, None, name).error()
    return held
