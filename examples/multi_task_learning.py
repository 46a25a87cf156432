"""Multi-task learning: one start for three families of tasks, meta-learned, beside joint training.

    python examples/multi_task_learning.py --figure multi_task.png

The families: intents of CLINC150 (5 classes per task), languages of names (CLDR, 5 classes), and the sentiment of sentences
in a language (NusaX, 3 labels). Every task has 25 examples; test tasks are of domains and languages that no training saw. It
needs the extra ``examples``, and ``clinc150`` and ``nusax_sentiment``, which ``metafast.tasks.corpora`` describes,
in the folder ``--folder`` (or METAFAST_DATA, or ../shared/data).

Rows, trained for about the same time in all:

- "MAML, together": one model, meta-trained on a mixture of the three;
- "MAML, one each": a model per family, each with a third of the meta-steps;
- "joint, fine-tuned": one model trained to tell all training classes of all families apart, then fine-tuned with a new head,
  at the rate that is best on each family's validation tasks.

The table has the accuracy on test tasks of each family, mean ± 95 % interval.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metafast
from metafast.inner import SGD
from metafast.models import Encoder, SentenceClassifier
from metafast.tasks import Examples, FewShot, Mixture, Tasks, Transfer, cldr, corpora
from metafast.training import Interval, Validation, classification_loss, evaluate, fit

PIECES, LENGTH, WIDTH, LAYERS = 3000, 24, 128, 1
WAYS, SHOTS, QUERIES, TASKS = 5, 5, 5, 4
STEPS, INNER_LR = 3, 0.3
RATES = (0.1, 0.3, 1.0, 3.0)
VALIDATION = "ngaju"


@dataclass(frozen=True)
class Family:
    """Tasks for training, validation and test, and the training examples by class, for joint training."""

    training: Tasks
    validation: Tasks
    test: Tasks
    classes: Mapping[str, Sequence[str]]


def families(folder: Path, seed: int) -> tuple[dict[str, Family], Any]:
    """The three families and a tokenizer of pieces of their training texts."""
    from metafast.integrations.word_pieces import learn_word_pieces

    intents = corpora.clinc150(folder / "clinc150")
    codes = cldr.split()
    names = [Examples(cldr.select(of_part)) for of_part in codes]
    sentences = corpora.nusax_sentiment(folder / "nusax_sentiment")
    parts = [
        [name for name in sentences["train"] if name not in (VALIDATION, *corpora.NUSAX_HELD_OUT)],
        [VALIDATION],
        list(corpora.NUSAX_HELD_OUT),
    ]
    sentiment: dict[str, list[str]] = {}
    for language in parts[0]:
        for label, texts in sentences["train"][language].items():
            sentiment.setdefault(label, []).extend(text for text in texts if text not in sentiment.get(label, ()))
    classes = {"intents": intents.training, "languages": names[0], "sentiment": sentiment}
    texts = (text for of_family in classes.values() for of_class in of_family.values() for text in of_class)
    tokenizer = learn_word_pieces(texts, PIECES)
    options = {"tokenizer": tokenizer, "max_length": LENGTH, "multiple": LENGTH}
    sizes = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES, **options}
    counts = {"shots": WAYS * SHOTS, "queries": WAYS * QUERIES, **options}

    def few_shot(parts: Sequence[Examples]) -> list[Tasks]:
        return [FewShot(part, **sizes, seed=3 * seed + n) for n, part in enumerate(parts)]

    transfer = [
        Transfer({name: sentences["train"][name] for name in part}, **counts, seed=3 * seed + n)
        for n, part in enumerate(parts)
    ]
    tasks = {"intents": few_shot(intents), "languages": few_shot(names), "sentiment": transfer}
    return {name: Family(*of_family, classes[name]) for name, of_family in tasks.items()}, tokenizer


@dataclass(frozen=True)
class Row:
    """Accuracies by family."""

    name: str
    accuracies: Mapping[str, Interval]
    iterations: int
    seconds: float

    def __str__(self) -> str:
        numbers = "".join(f"{found!s:>18}" for found in self.accuracies.values())
        return f"{self.name:<20}{numbers}{self.iterations:>12}{self.seconds:>9.0f}"


class Trainer:
    """Models, their training, and their test."""

    def __init__(self, of_name: Mapping[str, Family], tokenizer: Any, options: argparse.Namespace) -> None:
        self.families, self.tokenizer, self.options = of_name, tokenizer, options

    def model(self, classes: int) -> SentenceClassifier:
        """A new model."""
        encoder = Encoder(vocabulary=len(self.tokenizer), width=WIDTH, layers=LAYERS, heads=4, max_length=LENGTH)
        return SentenceClassifier(encoder, classes, width=WIDTH, normalize=True, scale=4.0)

    def learner(self, model: SentenceClassifier, lr: float = INNER_LR, steps: int = STEPS) -> metafast.MAML:
        """MAML of a model."""
        capture = self.options.capture and steps > 0
        return metafast.MAML(model, classification_loss, inner=SGD(lr=lr), steps=steps, capture=capture)

    def train(
        self,
        meta: metafast.MAML,
        tasks: Tasks,
        iterations: int,
        validation: Tasks | None = None,
        tasks_per_step: int = TASKS,
    ) -> float:
        """Trains, and returns the seconds of it."""
        optimizer = torch.optim.Adam(meta.parameters(), 2e-3)
        checks = None
        if validation is not None:
            checks = Validation(validation, every=max(1, iterations // 5), episodes=60, monitor="accuracy")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        found = fit(
            meta,
            tasks,
            optimizer,
            iterations=iterations,
            tasks_per_step=tasks_per_step,
            scheduler=schedule,
            clip_norm=1.0,
            validation=checks,
            progress=self.options.progress,
        )
        return found.seconds

    def test(self, meta: metafast.MAML, name: str) -> Interval:
        """Accuracy on the test tasks of a family."""
        return evaluate(meta, self.families[name].test, self.options.episodes, steps=[STEPS]).interval()

    def together(self) -> Row:
        """MAML on a mixture of all families; batches are of one family."""
        meta = self.learner(self.model(WAYS))
        training, validation = (
            Mixture(
                {name: getattr(of, part) for name, of in self.families.items()}, block=TASKS, seed=self.options.seed
            )
            for part in ("training", "validation")
        )
        seconds = self.train(meta, training, self.options.meta, validation)
        return Row(
            "MAML, together", {name: self.test(meta, name) for name in self.families}, self.options.meta, seconds
        )

    def one_each(self) -> Row:
        """MAML on each family alone."""
        accuracies, seconds, each = {}, 0.0, self.options.meta // len(self.families)
        for name, family in self.families.items():
            meta = self.learner(self.model(WAYS))
            seconds += self.train(meta, family.training, each, family.validation)
            accuracies[name] = self.test(meta, name)
        return Row("MAML, one each", accuracies, each * len(self.families), seconds)

    def joint(self) -> Row:
        """Joint training on all classes, then fine-tuning."""
        classes = {
            f"{name}: {label}": texts for name, of in self.families.items() for label, texts in of.classes.items()
        }
        sizes = {"ways": len(classes), "shots": 1, "queries": 1, "max_length": LENGTH, "shuffle": False}
        model = self.model(len(classes))
        # Without an inner step, the loss of the query set is that of ordinary training.
        tasks = FewShot(classes, **sizes, tokenizer=self.tokenizer, seed=self.options.seed)
        seconds = self.train(self.learner(model, steps=0), tasks, self.options.joint, tasks_per_step=1)
        body = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
        fresh = self.model(WAYS)
        fresh.load_state_dict({**fresh.state_dict(), **body})
        accuracies = {}
        for name, family in self.families.items():
            tuners = [self.learner(fresh, lr=lr) for lr in RATES]
            found = [evaluate(tuner, family.validation, 100, steps=[STEPS]).interval().mean for tuner in tuners]
            accuracies[name] = self.test(tuners[found.index(max(found))], name)
        return Row("joint, fine-tuned", accuracies, self.options.joint, seconds)


def draw(table: Sequence[Row], path: Path) -> None:
    """Accuracies by family and row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for number, row in enumerate(table):
        places = [place + 0.25 * number for place in range(len(row.accuracies))]
        found = list(row.accuracies.values())
        axes.bar(places, [of.mean for of in found], 0.23, yerr=[of.half_width for of in found], label=row.name)
    axes.set_xticks([place + 0.25 for place in range(len(table[0].accuracies))], list(table[0].accuracies))
    axes.set(ylabel="accuracy on test tasks")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--meta", type=int, default=300, help="meta-steps of MAML in all (default: %(default)s)")
    parser.add_argument("--joint", type=int, default=600, help="steps of joint training (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=200, help="test tasks per family (default: %(default)s)")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    options = parser.parse_args()

    started = time.perf_counter()
    of_name, tokenizer = families(options.folder, options.seed)
    columns = "".join(f"{name:>18}" for name in of_name)
    print(f"{'':<20}{columns}{'iterations':>12}{'seconds':>9}")
    table = []
    trainer = Trainer(of_name, tokenizer, options)
    for row in (trainer.together, trainer.one_each, trainer.joint):
        torch.manual_seed(options.seed)
        table.append(row())
        print(table[-1], flush=True)
    if options.figure is not None:
        draw(table, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
