"""Loaders of public corpora for few-shot classification, from folders that hold their files. Nothing is downloaded.

- CLINC150 (Larson et al., EMNLP-IJCNLP 2019; CC BY 3.0): ``data_full.json`` and ``domains.json`` of
  https://github.com/clinc/oos-eval, folder ``data``.
- HuffPost (News Category Dataset, Misra 2022; CC BY 4.0; folds of Bao et al., ICLR 2020): the folders ``01`` to ``05`` of
  https://github.com/YvoGao/LAQDA, folder ``data/HuffPost/few_shot``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metafast.tasks.examples import Examples, Split, split
from metafast.tasks.reading import read_examples

__all__ = ["clinc150", "huffpost"]

PARTS = ("train", "valid", "test")


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
