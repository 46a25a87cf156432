"""Cross-lingual transfer: the sentiment of sentences in languages that no training saw, from few examples of each.

    python examples/cross_lingual_transfer.py --figure transfer.png

It needs the extra ``examples``, and ``nusax_sentiment``, which ``metafast.tasks.corpora`` describes, in the folder
``--folder`` (or METAFAST_DATA, or ../shared/data). A task is a language: eight train, one validates, three test. All rows
start from the same Transformer, trained jointly on all training languages. Then, for about the same time,

- "joint, fine-tuned" goes on with joint training, and is fine-tuned on the examples of the new language;
- "MAML" is meta-trained, so that few steps on a language's examples help most.

The rate and the number of steps on the new language are the best on the validation language, for every row and number of
examples. The table has the accuracy on the three unseen languages with 0, 8 and 32 examples, mean ± 95 % interval over
draws of the examples.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import metafast
from metafast.inner import SGD
from metafast.models import Encoder, SentenceClassifier
from metafast.tasks import Tasks, Transfer, corpora
from metafast.training import Interval, Validation, classification_loss, evaluate, fit

PIECES, LENGTH, WIDTH, LAYERS = 2000, 48, 128, 1
VALIDATION = "ngaju"
VALIDATION_SENTENCES, TEST_SENTENCES = 50, 100
EXAMPLES = (8, 32)
META_SHOTS, STEPS = 32, 3
RATES, MORE_STEPS = (0.03, 0.1, 0.3, 1.0), (3, 10)


@dataclass(frozen=True)
class Row:
    """Accuracies by the number of examples."""

    name: str
    accuracies: Mapping[int, Interval]
    iterations: int
    seconds: float

    def __str__(self) -> str:
        numbers = "".join(f"{self.accuracies[count]!s:>18}" for count in sorted(self.accuracies))
        return f"{self.name:<20}{numbers}{self.iterations:>12}{self.seconds:>9.0f}"


class Languages:
    """The tasks of every part."""

    def __init__(self, folder: Path, seed: int) -> None:
        from metafast.integrations.word_pieces import learn_word_pieces

        self.parts = corpora.nusax_sentiment(folder)
        held_out = (VALIDATION, *corpora.NUSAX_HELD_OUT)
        self.training = [name for name in self.parts["train"] if name not in held_out]
        of_training = (self.parts["train"][name] for name in self.training)
        texts = (text for examples in of_training for of_label in examples.values() for text in of_label)
        self.tokenizer = learn_word_pieces(texts, PIECES)
        self.seed = seed

    def tasks(self, names: Sequence[str], shots: int, queries: int, queries_from: str | None = None) -> Transfer:
        """Tasks of some languages; sentences to learn from are of ``train.csv``."""
        return Transfer(
            {name: self.parts["train"][name] for name in names},
            queries_from=None if queries_from is None else {name: self.parts[queries_from][name] for name in names},
            shots=shots,
            queries=queries,
            tokenizer=self.tokenizer,
            max_length=LENGTH,
            multiple=LENGTH,
            seed=self.seed,
        )


def measured(meta: metafast.MAML, languages: Languages, options: argparse.Namespace) -> dict[int, Interval]:
    """Accuracies on the unseen languages, adapted as is best on the validation language."""
    found = {}
    for examples in EXAMPLES:
        validation = languages.tasks([VALIDATION], examples, VALIDATION_SENTENCES, "valid")
        test = languages.tasks(corpora.NUSAX_HELD_OUT, examples, TEST_SENTENCES, "test")
        tuners = [metafast.MAML(meta.model, classification_loss, inner=SGD(lr=lr), steps=STEPS) for lr in RATES]
        candidates = []
        for tuner in tuners:
            values = evaluate(tuner, validation, 6, steps=MORE_STEPS, tasks_per_batch=3)
            candidates += [(values.interval(steps=steps).mean, steps, tuner) for steps in MORE_STEPS]
        _, steps, best = max(candidates, key=lambda candidate: candidate[0])
        values = evaluate(best, test, options.episodes, steps=[0, steps], tasks_per_batch=3)
        found |= {0: values.interval(steps=0), examples: values.interval(steps=steps)}
    return found


def rows(languages: Languages, options: argparse.Namespace) -> Iterator[Row]:
    """Trains and evaluates everything."""
    torch.manual_seed(options.seed)
    encoder = Encoder(vocabulary=len(languages.tokenizer), width=WIDTH, layers=LAYERS, heads=4, max_length=LENGTH)
    torch.nn.init.normal_(encoder.tokens.weight, std=0.3)
    torch.nn.init.normal_(encoder.positions.weight, std=0.05)
    model = SentenceClassifier(encoder, 3, width=WIDTH, normalize=True, scale=4.0)
    validation = languages.tasks([VALIDATION], META_SHOTS, VALIDATION_SENTENCES, "valid")

    def train(meta: metafast.MAML, tasks: Tasks, lr: float, iterations: int) -> float:
        optimizer = torch.optim.Adam(meta.parameters(), lr)
        checks = Validation(validation, every=max(1, iterations // 10), episodes=6, monitor="accuracy")
        progress = options.progress
        return fit(
            meta, tasks, optimizer, iterations=iterations, clip_norm=1.0, validation=checks, progress=progress
        ).seconds

    # Without an inner step, the loss of the query set is that of ordinary training.
    joint = metafast.MAML(model, classification_loss, inner=SGD(lr=0.0), steps=0)
    everything = languages.tasks(languages.training, 1, META_SHOTS)
    shared = train(joint, everything, 1e-3, options.joint)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    seconds = shared + train(joint, everything, 1e-3, options.more)
    accuracies = measured(joint, languages, options)
    yield Row("joint, fine-tuned", accuracies, options.joint + options.more, seconds)

    model.load_state_dict(first)
    meta = metafast.MAML(
        model, classification_loss, inner=SGD(lr=options.inner_lr), steps=STEPS, capture=options.capture
    )
    seconds = shared + train(meta, languages.tasks(languages.training, META_SHOTS, META_SHOTS), 1e-3, options.meta)
    yield Row("MAML", measured(meta, languages, options), options.joint + options.meta, seconds)


def draw(table: Sequence[Row], path: Path) -> None:
    """Accuracy by the number of examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for row in table:
        counts = sorted(row.accuracies)
        found = [row.accuracies[count] for count in counts]
        means, widths = [of.mean for of in found], [of.half_width for of in found]
        axes.errorbar(range(len(counts)), means, widths, label=row.name, capsize=3)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(xlabel="examples of the new language", ylabel="accuracy")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--joint", type=int, default=300, help="iterations that all rows share (default: %(default)s)")
    parser.add_argument("--more", type=int, default=600, help="further ones of joint training (default: %(default)s)")
    parser.add_argument("--meta", type=int, default=100, help="meta-steps of MAML (default: %(default)s)")
    parser.add_argument(
        "--inner-lr", type=float, default=0.3, help="learning rate of MAML's steps (default: %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=60, help="test tasks, languages in turn (default: %(default)s)")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    options = parser.parse_args()

    started = time.perf_counter()
    languages = Languages(options.folder / "nusax_sentiment", options.seed)
    columns = "".join(f"{f'{count} examples':>18}" for count in (0, *EXAMPLES))
    print(f"{len(languages.training)} languages train\n\n{'':<20}{columns}{'iterations':>12}{'seconds':>9}")
    table = []
    for row in rows(languages, options):
        table.append(row)
        print(row, flush=True)
    if options.figure is not None:
        draw(table, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
