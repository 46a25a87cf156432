"""Labelled examples from files, from Hugging Face's and torch's datasets, and from mappings."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metafast.tasks.examples import Examples

__all__ = ["read_examples"]

FORMATS = (".csv", ".tsv", ".json", ".jsonl")
# Of CLINC150: lists of [text, intent]; those named oos_* are out of scope, which is no intent.
CLINC_PARTS = ("train", "val", "test")


class Row(NamedTuple):
    """An example, its label, and where it was read."""

    example: Any
    label: str
    place: str


def read_examples(source: Any, *, text: str = "text", label: str = "label") -> Examples:
    r"""Reads labelled examples.

    Args:
        source: one of

            - a mapping from label to examples;
            - the path of a UTF-8 file: ``.csv`` or ``.tsv`` with a header line; ``.json`` with an object from label to
              texts, a list of objects, or CLINC150's object of lists of ``[text, intent]`` (its parts train, val and test
              together, without those out of scope); ``.jsonl`` or ``.json`` with an object per line. Lines end at
              ``\n`` alone;
            - a Hugging Face ``datasets.Dataset``;
            - a torch ``Dataset`` of pairs ``(x, y)``, where ``y`` is an int, a str or a tensor of one number.
        text, label: names of the columns of a table.

    Raises:
        TypeError: the source is none of these.
        ValueError: a column is missing, a row has no text or no label, bytes are no UTF-8, JSON is broken off, or there
            is no row; the message says where.
        OSError: the file cannot be read.
    """
    if isinstance(source, Examples):
        return source
    if isinstance(source, Mapping):
        return Examples(source)
    if isinstance(source, str | Path):
        return _read_file(Path(source), text, label)
    if hasattr(source, "column_names"):
        return _collected(_of_hugging_face(source, text, label), "dataset")
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Sequence):
        return _collected(_of_pairs(source), "dataset")
    raise TypeError(
        "examples: expected a mapping from label to examples, a path, a Hugging Face dataset or a torch Dataset of pairs, "
        f"got {type(source).__name__}"
    )


def _read_file(path: Path, text: str, label: str) -> Examples:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file whose name ends in {', '.join(FORMATS)}")
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, got the byte {data[error.start]:#04x}") from error
    if path.suffix in (".csv", ".tsv"):
        return _collected(_of_csv(path, content, text, label), str(path))
    if path.suffix == ".json":
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            # A second value is another line of JSON lines. Anything else is broken.
            if error.msg != "Extra data":
                raise ValueError(f"{path}, line {error.lineno}: expected JSON ({error.msg})") from error
        else:
            # One line of JSON lines is an object whose columns are no lists.
            if not (isinstance(value, dict) and isinstance(value.get(text), str)):
                return _of_json(path, value, text, label)
    return _collected(_of_json_lines(path, content, text, label), str(path))


def _of_csv(path: Path, content: str, text: str, label: str) -> Iterator[Row]:
    # Iterating over a str's lines would end them at other characters, too.
    lines = (line + "\n" for line in content.split("\n"))
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        found = reader.fieldnames or ()
        _check_columns(str(path), found, text, label)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{place}: expected {len(found)} columns, got {len(found) + len(row[None])}")
            yield _row(row, text, label, place)
    except csv.Error as error:
        # The reader has counted the lines of whole rows; the broken one begins after them.
        raise ValueError(f"{path}, line {reader.line_num + 1}: expected CSV ({error})") from error


def _of_json_lines(path: Path, content: str, text: str, label: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: expected a JSON object ({error.msg})") from error
        yield _json_row(value, text, label, place)


def _of_json(path: Path, value: Any, text: str, label: str) -> Examples:
    if isinstance(value, list):
        return _collected(
            (_json_row(row, text, label, f"{path}, row {n}") for n, row in enumerate(value, 1)), str(path)
        )
    if not isinstance(value, dict) or not all(isinstance(part, list) for part in value.values()):
        raise ValueError(
            f"{path}: expected an object from label to texts, a list of objects, or CLINC150's lists of pairs"
        )
    if any(isinstance(row, list) for part in value.values() for row in part):
        missing = [part for part in CLINC_PARTS if part not in value]
        if missing:
            raise ValueError(
                f"{path}: expected CLINC150's parts {', '.join(CLINC_PARTS)}; {', '.join(missing)} missing"
            )
        return _collected(_of_clinc(path, value), str(path))
    return _collected(
        (
            _checked(example, name, f"{path}, text {n} of {name!r}")
            for name, texts in value.items()
            for n, example in enumerate(texts, 1)
        ),
        str(path),
    )


def _of_clinc(path: Path, value: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for part in CLINC_PARTS:
        for number, row in enumerate(value[part], 1):
            place = f"{path}, row {number} of {part!r}"
            if not isinstance(row, list) or len(row) != 2:
                raise ValueError(f"{place}: expected [text, intent], got {row!r}")
            yield _checked(row[0], row[1], place)


def _of_hugging_face(dataset: Any, text: str, label: str) -> Iterator[Row]:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise TypeError(f"dataset: expected one of the splits {', '.join(columns)}, got all; pass dataset['train']")
    _check_columns("dataset", columns, text, label)
    # A ClassLabel column holds numbers of names.
    names = getattr(getattr(dataset, "features", {}).get(label), "names", None)
    for number, (example, key) in enumerate(zip(dataset[text], dataset[label], strict=True)):
        place = f"dataset, row {number}"
        yield _checked(example, key if names is None else names[key], place)


def _of_pairs(dataset: Any) -> Iterator[Row]:
    for number in range(len(dataset)):
        place = f"dataset, item {number}"
        item = dataset[number]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{place}: expected a pair (x, y), got {type(item).__name__}")
        example, key = item
        key = key.item() if hasattr(key, "item") else key
        if isinstance(example, str):
            yield _checked(example, key, place)
        else:
            yield Row(example, str(key), place)


def _json_row(value: Any, text: str, label: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with {text!r} and {label!r}, got {type(value).__name__}")
    _check_columns(place, value, text, label)
    return _row(value, text, label, place)


def _check_columns(place: str, found: Iterable[str], text: str, label: str) -> None:
    found = list(found)
    missing = [column for column in (text, label) if column not in found]
    if missing:
        raise ValueError(
            f"{place}: expected columns {text} and {label}; {' and '.join(missing)} missing, found "
            f"{', '.join(map(str, found)) or 'none'}; text= and label= name others"
        )


def _row(row: Mapping[str, Any], text: str, label: str, place: str) -> Row:
    return _checked(row[text], row[label], place)


def _checked(example: Any, label: Any, place: str) -> Row:
    """A row whose example is a text and whose label is a name or a number."""
    if not isinstance(example, str) or not example.strip():
        raise ValueError(f"{place}: expected a text, got {example!r}; remove the row or fill it in")
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(f"{place}: expected a label, got {label!r}; remove the row or fill it in")
    return Row(example.strip(), str(label).strip(), place)


def _collected(rows: Iterable[Row], source: str) -> Examples:
    by_label: dict[str, list[Any]] = {}
    places: dict[str, list[str]] = {}
    for example, label, place in rows:
        by_label.setdefault(label, []).append(example)
        places.setdefault(label, []).append(place)
    if not by_label:
        raise ValueError(f"{source}: expected at least one row, got none")
    return Examples(by_label, places)
