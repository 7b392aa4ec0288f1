"""Rows of Parquet and Arrow files, some at a time; needs pyarrow, the extra `data`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

from reap.errors import CalibrationError, MissingExtraError
from reap.files.strict_json import shorten
from reap.text.lines import BadLine, Row

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 64, 4 << 20
_BUFFER = 1 << 20
# Columns of structures hold every name that any row has: what a row lacks is null, and was not in the data
_UNIONS = ("tools", "functions", "tool_calls")


class ColumnarFile:
    """A Parquet or Arrow file.

    Attributes:
        path: of a regular file
        wanted: names of the columns to read; all others stay on the disk
        position: bytes of the file that are read, estimated by rows
    """

    def __init__(self, path: str, wanted: Collection[str]) -> None:
        self.path = path
        self._wanted = wanted
        self._n_bytes = os.path.getsize(path)
        self._share = 0.0
        self.names: list[str] = []

    @property
    def position(self) -> int:
        return round(self._share * self._n_bytes)

    def rows(self) -> Iterator[Row | BadLine]:
        """The rows; a column that is not wanted is None. CalibrationError where the file is damaged, MissingExtraError
        without pyarrow."""
        arrow = _pyarrow(self.path)
        number = 0
        unread: dict[str, None] = {}
        try:
            for batch, share in self._batches(arrow):
                unread = unread or dict.fromkeys(self.names)
                step = _rows_at_once(batch.nbytes, batch.num_rows)
                for start in range(0, batch.num_rows, step):
                    for members in _values(batch.slice(start, step)):
                        number += 1
                        self._share = share
                        where = f"{self.path}: row {number}"
                        if isinstance(members, UnicodeDecodeError):
                            yield BadLine(where, number, "is not UTF-8 text", "not UTF-8 text")
                        elif isinstance(members, Exception):
                            problem = f"has a value that Python cannot hold: {members}"
                            yield BadLine(where, number, problem, "value out of range")
                        else:
                            yield Row(where, number, {**unread, **_without_unions(members)})
        except (arrow.ArrowException, OSError) as error:
            detail = " ".join(str(error).split())[:200]
            raise CalibrationError(f"{self.path}: cannot be read after row {number}: {detail}") from error

    def _batches(self, arrow: Any) -> Iterator[tuple[Any, float]]:
        with open(self.path, "rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            yield from self._parquet_batches()
            return
        with arrow.OSFile(self.path) as source:
            try:
                reader = arrow.ipc.open_file(source)
            except arrow.ArrowInvalid:  # datasets writes streams, without a footer
                source.seek(0)
                reader = arrow.ipc.open_stream(source)
                self.names = reader.schema.names
                for batch in reader:
                    yield self._narrow(batch), source.tell() / max(self._n_bytes, 1)
                return
            self.names = reader.schema.names
            for index in range(reader.num_record_batches):
                yield self._narrow(reader.get_batch(index)), (index + 1) / reader.num_record_batches

    def _narrow(self, batch: Any) -> Any:
        return batch.select(self._columns())

    def _columns(self) -> list[str]:
        double = next((name for name in self.names if name in self._wanted and self.names.count(name) > 1), None)
        if double is not None:
            raise CalibrationError(f"{self.path}: has the column {shorten(double)} twice; expected each name once")
        # one at least: a batch without columns has no rows
        return [name for name in self.names if name in self._wanted] or self.names[:1]

    def _parquet_batches(self) -> Iterator[tuple[Any, float]]:
        parquet = import_module("pyarrow.parquet")
        # without a buffer a whole column of a row group is read at once
        with parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False, memory_map=False) as file:
            self.names = file.schema_arrow.names
            total, done = max(file.metadata.num_rows, 1), 0
            n_bytes = sum(file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
            step = _rows_at_once(n_bytes, total)
            for batch in file.iter_batches(batch_size=step, columns=self._columns(), use_threads=False):
                done += batch.num_rows
                yield batch, done / total


def _values(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows as Python's values, or what is wrong with one: text that is not UTF-8, which Parquet does not check, or
    a time that Python does not reach."""
    try:
        rows: list[dict[str, Any] | Exception] = [_with_maps(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
        return [row for index in range(batch.num_rows) for row in _values(batch.slice(index, 1))]
    return rows


def _with_maps(value: Any) -> Any:
    """The value with Arrow's maps, which come as lists of tuples, as dictionaries."""
    if isinstance(value, dict):
        return {name: _with_maps(item) for name, item in value.items()}
    if not isinstance(value, list) or not value or isinstance(value[0], int | str):
        return value
    if isinstance(value[0], tuple):
        return {name: _with_maps(item) for name, item in value}
    return [_with_maps(item) for item in value]


def _rows_at_once(n_bytes: int, n_rows: int) -> int:
    """How many rows of this average size to hold at once."""
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * n_rows // max(n_bytes, 1)))


def _pyarrow(path: str) -> Any:
    try:
        return import_module("pyarrow")
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"{path}: to read Parquet or Arrow needs pyarrow: pip install 'reap-moe[data]'"
        ) from None


def _without_unions(members: dict[str, Any]) -> dict[str, Any]:
    """The row without the names that only other rows' tools and calls have."""
    for name, value in members.items():
        if name in _UNIONS:
            members[name] = _without_nulls(value)
        elif isinstance(value, list):
            for entry in value:
                if isinstance(entry, dict):
                    entry.update({key: _without_nulls(entry[key]) for key in _UNIONS if entry.get(key)})
    return members


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
