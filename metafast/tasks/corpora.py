"""Loaders of public corpora, from folders that hold their files. Nothing is downloaded.

- CLINC150 (Larson et al., EMNLP-IJCNLP 2019; CC BY 3.0): ``data_full.json`` and ``domains.json`` of
  https://github.com/clinc/oos-eval, folder ``data``.
- HuffPost (News Category Dataset, Misra 2022; CC BY 4.0; folds of Bao et al., ICLR 2020): the folders ``01`` to ``05`` of
  https://github.com/YvoGao/LAQDA, folder ``data/HuffPost/few_shot``.
- NusaX (Winata et al., EACL 2023; CC BY-SA 4.0): ``train.csv``, ``valid.csv`` and ``test.csv`` of the folder ``datasets/mt``
  of https://github.com/IndoNLP/nusax for translation, the folders of languages of ``datasets/sentiment`` for sentiment.
- Synthetic-Persona-Chat (Jandaghi et al. 2023, arXiv:2312.10007; CC BY 4.0): ``valid.csv`` and ``test.csv`` of
  https://github.com/google-research-datasets/Synthetic-Persona-Chat, folder ``data``.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from metafast.tasks.examples import Examples, Split, split
from metafast.tasks.pairs import Pair
from metafast.tasks.reading import read_examples

__all__ = ["clinc150", "huffpost", "nusax_sentiment", "nusax_translation", "persona_chat"]

PARTS = ("train", "valid", "test")
NUSAX_HELD_OUT = ("acehnese", "buginese", "toba_batak")
"""The languages of NusaX that this project's examples never train on."""


def clinc150(
    folder: str | Path, *, validation: Sequence[str] = ("work",), test: Sequence[str] = ("banking", "travel")
) -> Split:
    """CLINC150's intents, split by domain. A text that is also in a held-out domain is dropped from the other.

    Args:
        folder: folder of ``data_full.json`` and ``domains.json``.
        validation, test: names of domains, 15 intents each; the others train.

    Raises:
        ValueError: a domain is unknown or in both, or a file is not as described.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    path = folder / "domains.json"
    try:
        domains = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object from domain to intents ({error})") from error
    held_out = {}
    for name, chosen in (("validation", validation), ("test", test)):
        unknown = [domain for domain in chosen if domain not in domains]
        if unknown:
            raise ValueError(f"{name}: expected domains among {', '.join(domains)}; got {', '.join(unknown)}")
        held_out[name] = [intent for domain in chosen for intent in domains[domain]]
    examples = read_examples(folder / "data_full.json")
    return split(examples, validation=held_out["validation"], test=held_out["test"], drop_shared=True)


def huffpost(folder: str | Path, fold: int = 1) -> Split:
    """HuffPost's headlines in one of the five published folds: 20 classes train, 5 validate, 16 test.

    Args:
        folder: folder of ``01`` (all examples as JSON lines) to ``05`` (each with the classes of a fold).
        fold: 1 to 5.

    Raises:
        ValueError: the fold is no such number, or a file is not as described.
        OSError: a file cannot be read.
    """
    if fold not in range(1, 6):
        raise ValueError(f"fold: expected 1 to 5, got {fold}")
    folder = Path(folder)
    parts = [read_examples(folder / "01" / f"{part}.json", text="sentence") for part in PARTS]
    examples = _joined(parts)
    labels = [(folder / f"{fold:02}" / f"labels.{part}.txt").read_text(encoding="utf-8").split() for part in PARTS]
    return Split(
        *(examples.select(of_part, f"labels.{part}.txt") for part, of_part in zip(PARTS, labels, strict=True))
    ).checked()


def _joined(parts: Sequence[Examples]) -> Examples:
    """Parts without common labels as one."""
    return Examples(
        {label: of_label for part in parts for label, of_label in part.items()},
        {label: [part.place(label, n) for n in range(len(of))] for part in parts for label, of in part.items()},
    )


def nusax_sentiment(folder: str | Path) -> dict[str, dict[str, Examples]]:
    """Sentences by sentiment, in twelve languages: ``parts["train"]["javanese"]["positive"]``.

    Args:
        folder: folder of a folder per language, each with ``train.csv``, ``valid.csv`` and ``test.csv``.

    Raises:
        ValueError, OSError: a file is not as described or cannot be read.
    """
    folder = Path(folder)
    languages = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not languages:
        raise ValueError(f"folder: expected a folder per language in {folder}, got none")
    return {part: {name: read_examples(folder / name / f"{part}.csv") for name in languages} for part in PARTS}


def nusax_translation(folder: str | Path, source: str = "indonesian") -> dict[str, dict[str, list[Pair]]]:
    """Pairs of a sentence and its translation, in eleven languages: ``parts["train"]["javanese"]``.

    Args:
        folder: folder of ``train.csv``, ``valid.csv`` and ``test.csv``, which have a column per language.
        source: the language that is translated from.

    Raises:
        ValueError, OSError: a file is not as described or cannot be read.
    """
    return {part: parallel(Path(folder) / f"{part}.csv", source) for part in PARTS}


def parallel(path: Path, source: str) -> dict[str, list[Pair]]:
    """Pairs by language from a CSV file with a column per language. A column without a name numbers the rows.

    Raises:
        ValueError: the file has no such column, or a row has other columns.
        OSError: the file cannot be read.
    """
    rows = list(_rows(path))
    languages = [name for name in rows[0] if name and name != source] if rows else []
    if not languages or source not in rows[0]:
        raise ValueError(
            f"{path}: expected a column {source!r} and others, got {', '.join(rows[0]) if rows else 'none'}"
        )
    return {name: [(row[source], row[name]) for row in rows] for name in languages}


def persona_chat(folder: str | Path) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """What people of ``valid.csv`` and of ``test.csv`` heard and answered, turn by turn.

    Returns:
        ``people["row 0, user 1"]`` is a list of pairs, without turns before which nothing was said; for training, and for
        testing.

    Raises:
        ValueError, OSError: a file is not as described or cannot be read.
    """
    training, test = (_people(Path(folder) / f"{part}.csv") for part in ("valid", "test"))
    return training, test


SPEAKERS = ("User 1", "User 2")
CONVERSATION = "Best Generated Conversation"


def _people(path: Path) -> dict[str, list[Pair]]:
    people = {}
    for number, row in enumerate(_rows(path)):
        if CONVERSATION not in row:
            raise ValueError(f"{path}: expected a column {CONVERSATION!r}, got {', '.join(row)}")
        turns = list(_turns(row[CONVERSATION]))
        for speaker in SPEAKERS:
            answers = [(before[1], turn[1]) for before, turn in itertools.pairwise(turns) if turn[0] == speaker]
            people[f"row {number}, {speaker.lower()}"] = answers
    return people


def _turns(conversation: str) -> Iterator[tuple[str, str]]:
    """Speaker and text of each turn. Lines of one speaker, and lines without a speaker, continue a turn."""
    speaker = ""
    texts: list[str] = []
    for line in conversation.split("\n"):
        name, colon, text = line.partition(":")
        if colon and name.strip() in SPEAKERS and name.strip() != speaker:
            if texts:
                yield speaker, " ".join(texts)
            speaker, texts = name.strip(), []
        else:
            text = text if colon and name.strip() == speaker else line
        if speaker and text.strip():
            texts.append(text.strip())
    if texts:
        yield speaker, " ".join(texts)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"expected as many fields as columns in line {reader.line_num}")
                yield row
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8 with a header ({error})") from error
