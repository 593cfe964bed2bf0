"""Reading a trace: a parquet file of per-client rates, or one of single requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.lib
import pyarrow.parquet

from deployments.simulate.workload import RateTrace, RequestTrace
from experts.errors import ConfigError

__all__ = ["read_trace"]

ROWS_MAX = 5_000_000
_RATES = ("t_s", "rate_rps", "cv", "client")
_REQUESTS = ("arrival_s", "input_tokens", "output_tokens")


def read_trace(path: Path) -> RateTrace | RequestTrace:
    """Raises ConfigError for a file that is missing, unreadable, too large or of other columns."""
    columns = _read_columns(path)
    if all(name in columns for name in _RATES):
        return _rates(path, columns)
    if all(name in columns for name in _REQUESTS):
        return _requests(path, columns)
    raise _wrong(path, f"has neither the columns {', '.join(_RATES)} nor {', '.join(_REQUESTS)}")


def _read_columns(path: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    if not path.is_file():
        raise _wrong(path, "there is no such file")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if file.metadata.num_rows > ROWS_MAX:
            raise _wrong(path, f"has more than {ROWS_MAX} rows")
        wanted = [name for name in file.schema_arrow.names if name in {*_RATES, *_REQUESTS}]
        table = file.read(columns=wanted)
        columns = {n: table[n].to_numpy().astype(np.float64) for n in table.column_names}
    except (pyarrow.lib.ArrowException, OSError, ValueError, TypeError) as error:
        raise _wrong(path, f"is not a readable parquet file of numbers: {error}") from error
    if table.num_rows == 0:
        raise _wrong(path, "has no rows")
    if not all(np.isfinite(values).all() and (values >= 0).all() for values in columns.values()):
        raise _wrong(path, "holds a value that is negative or not a number")
    return columns


def _rates(
    path: Path, columns: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]
) -> RateTrace:
    starts_s, start_of_row = np.unique(columns["t_s"], return_inverse=True)
    numbers = columns["client"].astype(np.int64)
    lengths_s = np.diff(starts_s)
    if len(lengths_s) == 0 or not np.allclose(lengths_s, lengths_s[0]):
        raise _wrong(path, "needs at least two windows, all of one length")
    if (numbers.max() + 1) * len(starts_s) > ROWS_MAX:
        raise _wrong(path, f"has more than {ROWS_MAX} pairs of client and window")
    rate_rps = np.zeros((int(numbers.max()) + 1, len(starts_s)))
    cv = np.ones_like(rate_rps)
    rate_rps[numbers, start_of_row] = columns["rate_rps"]
    cv[numbers, start_of_row] = columns["cv"]
    return RateTrace(float(lengths_s[0]), rate_rps, cv)


def _requests(
    path: Path, columns: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]
) -> RequestTrace:
    order = np.argsort(columns["arrival_s"], kind="stable")
    inputs, outputs = (
        np.maximum(1, columns[name][order]).astype(np.int64) for name in _REQUESTS[1:]
    )
    return RequestTrace(columns["arrival_s"][order], inputs, outputs)


def _wrong(path: Path, reason: str) -> ConfigError:
    return ConfigError(str(path), None, "", reason)
