"""Finds the file and the line that cannot be read: the libraries that read text, JSON, CSV and Parquet do not name them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


# Of a field of CSV: as many as the module can count on any platform.
MOST_CHARACTERS = 2**31 - 1


def require_texts(files: Iterable[str], builder: str, column: str, rows: int | None = None) -> None:
    """Reads files again to find the first file, and the line in it, that cannot be used for training.

    Args:
        files: all of one kind.
        builder: of `datasets`: text, json, csv or parquet.
        column: of the text. Rows may have null in it, and must have it.
        rows: of each file of text, JSON or CSV to look at; if not given, all.

    Raises:
        ValueError: if there is such a file. It names the file, and the line, or the column.
    """
    checks = {"text": _require_utf8, "json": _require_json, "csv": _require_csv, "parquet": _require_parquet}
    check = checks[builder]
    empty = [name for name in files if check(name, column, rows) == 0]
    if empty and builder != "text":
        raise ValueError(f"{empty[0]} must hold rows with `{column}`, it is empty.")


def _require_utf8(name: str, column: str, rows: int | None) -> int:
    return sum(1 for _ in islice(_lines(name), rows))


def _lines(name: str) -> Iterator[str]:
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} must be text in UTF-8, line {number} is not: {error}.") from None


def _require_json(name: str, column: str, rows: int | None) -> int:
    """JSON lines, or one document: an object, or a list of them."""
    count = 0
    for place, row in islice(_json_rows(name), rows):
        count += 1
        if not isinstance(row, dict) or column not in row:
            found = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{name} must have `{column}` in every row, {place} has {found}.")
        _require_text(row[column], f"`{column}` in {place} of {name}")
    return count


def _require_text(value: Any, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__} {value!r:.40}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must be text in UTF-8: {error}.") from None


def _json_rows(name: str) -> Iterator[tuple[str, Any]]:
    lines = ((number, line) for number, line in enumerate(_lines(name), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    try:
        whole = json.loads(first[1])
    except ValueError:
        # The document may span several lines.
        lines, whole = iter(()), _json(name, Path(name).read_text(encoding="utf-8"))
    if isinstance(whole, list):
        for index, row in enumerate(whole, start=1):
            yield f"row {index}", row
        return
    yield f"line {first[0]}", whole
    for number, line in lines:
        yield f"line {number}", _json(name, line, number)


def _json(name: str, text: str, number: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno if number is None else number
        raise ValueError(
            f"{name} must be JSON, line {line} is not, from column {error.colno} on: {error.msg}."
        ) from None


def _require_csv(name: str, column: str, rows: int | None) -> int:
    """A line with the names of columns, and rows of as many fields; a field in quotes may have several lines."""
    lines = _lines(name)
    # As Excel begins a file in UTF-8.
    lines = (line.removeprefix("\ufeff") if number == 0 else line for number, line in enumerate(lines))
    reader, count, line = csv.reader(lines, strict=True), 0, 1
    # A field may be a document.
    limit = csv.field_size_limit(MOST_CHARACTERS)
    try:
        columns = next(filter(None, reader), None)
        if columns is None:
            return 0
        if column not in columns:
            raise ValueError(f"{name} must have the column `{column}`, it has {', '.join(columns) or 'none'}.")
        line = reader.line_num + 1
        for row in reader:
            # A blank line is no row.
            if row and len(row) != len(columns):
                raise ValueError(
                    f"{name} must have the {len(columns)} fields {', '.join(columns)} in every row, line {line} has {len(row)}."
                )
            count, line = count + bool(row), reader.line_num + 1
            if count == rows:
                break
    except csv.Error as error:
        raise ValueError(f"{name} must be CSV, line {line} begins a row that is not: {error}.") from None
    finally:
        csv.field_size_limit(limit)
    return count


def _require_parquet(name: str, column: str, rows: int | None) -> int:
    try:
        with pq.ParquetFile(name) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} must be Parquet, it is not: {str(error).rstrip('.')}.") from None
    if column not in schema.names:
        raise ValueError(f"{name} must have the column `{column}`, it has {', '.join(schema.names) or 'none'}.")
    kind = schema.field(column).type
    if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ValueError(f"`{column}` of {name} must be text, got {kind}.")
    return count
