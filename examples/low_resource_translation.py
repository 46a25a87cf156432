"""Low-resource translation: an encoder–decoder that adapts to a language on a few pairs of sentences.

    python examples/low_resource_translation.py --figure translation.png    # NusaX: Indonesian to three unseen languages
    python examples/low_resource_translation.py --data cldr                 # English names to unseen languages

It needs the extra ``examples``, and for NusaX ``nusax_mt``, which ``metafast.tasks.corpora`` describes, in the folder
``--folder`` (or METAFAST_DATA, or ../shared/data). A task is a language. Rows, for 16, 64 and 256 pairs of a new language:

- "source as it is": nothing is translated, which related languages make a good guess;
- "from scratch": a new model, trained on these pairs alone;
- "fine-tuned": a model trained jointly on all training languages, then fine-tuned on the pairs;
- "MAML": meta-trained from where that joint training was after a part of its iterations, for about the rest of its time.

Rule, rate and number of steps on the new pairs are, for every row and number of pairs, those with the best chrF on a
validation language. The table has chrF and BLEU (sacrebleu) on test sentences, means over the unseen languages. Sentences
have at most 20 words.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import metafast
from metafast.inner import SGD, Adam
from metafast.models import EncoderDecoder
from metafast.tasks import Translation, cldr, corpora
from metafast.training import Validation, fit, translation_loss

Pairs = Mapping[str, Sequence[tuple[str, str]]]
PAIRS = (16, 64, 256)
WIDTH, LAYERS, HEADS = 96, 1, 4
STEPS, INNER_LR, META_SHOTS, TASKS = 3, 0.1, 16, 2
BATCH, VALIDATION_SENTENCES = 16, 30
# The languages of the others' family; English is not.
UNRELATED, WORDS = ("english",), 20
# What a row chooses from on the validation language: the rule of the steps, and their number.
RULES = {"SGD 0.1": SGD(lr=0.1), "Adam 0.0001": Adam(lr=1e-4), "Adam 0.001": Adam(lr=1e-3)}
WAYS = [("SGD 0.1", 3), ("SGD 0.1", 20), ("Adam 0.0001", 20), ("Adam 0.001", 20)]
FROM_SCRATCH = [("Adam 0.001", 50), ("Adam 0.001", 150)]
Way = tuple[str, int]


@dataclass(frozen=True)
class Data:
    """Pairs of training languages; of a validation language and of unseen ones, pairs to learn from and to translate."""

    training: Pairs
    validation: Pairs
    validation_queries: Pairs
    unseen: Pairs
    unseen_queries: Pairs
    pieces: int
    length: int


def nusax(folder: Path) -> Data:
    """NusaX: ``train.csv`` is learned from, ``valid.csv`` validates, ``test.csv`` tests."""
    parts = {part: short(of) for part, of in corpora.nusax_translation(folder / "nusax_mt").items()}
    validation = ("ngaju",)
    training = [name for name in parts["train"] if name not in (*UNRELATED, *validation, *corpora.NUSAX_HELD_OUT)]
    return Data(
        chosen(parts["train"], training),
        chosen(parts["train"], validation),
        chosen(parts["valid"], validation),
        chosen(parts["train"], corpora.NUSAX_HELD_OUT),
        chosen(parts["test"], corpora.NUSAX_HELD_OUT),
        pieces=2000,
        length=56,
    )


def short(pairs: Pairs) -> Pairs:
    """The pairs whose source has few words."""
    return {name: [pair for pair in of if len(pair[0].split()) <= WORDS] for name, of in pairs.items()}


def cldr_names(folder: Path) -> Data:
    """CLDR: English names of territories, languages, currencies … and those of languages in Latin script; no folder."""
    split = cldr.split()
    latin = [[code for code in part if cldr.script(cldr.names()[code]) == "LATIN"] for part in split]
    pairs = {code: cldr.translations(code) for part in latin for code in part}
    validation, unseen = latin[1][:1], latin[2][:3]
    return Data(
        chosen(pairs, latin[0]),
        *halves(chosen(pairs, validation)),
        *halves(chosen(pairs, unseen)),
        pieces=1000,
        length=24,
    )


def halves(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Every other pair, and the others."""
    return {name: of[::2] for name, of in pairs.items()}, {name: of[1::2] for name, of in pairs.items()}


def chosen(pairs: Pairs, languages: Sequence[str]) -> Pairs:
    """The pairs of some languages."""
    return {name: pairs[name] for name in languages}


@dataclass(frozen=True)
class Score:
    """chrF and BLEU, 0 to 100."""

    chrf: float
    bleu: float

    def __str__(self) -> str:
        return f"{self.chrf:>10.1f}{self.bleu:>7.1f}"


class Run:
    """A tokenizer, models and their training."""

    def __init__(self, data: Data, options: argparse.Namespace) -> None:
        from metafast.integrations.word_pieces import learn_word_pieces

        self.data, self.options = data, options
        texts = (text for of in data.training.values() for pair in of for text in pair)
        self.tokenizer = learn_word_pieces(texts, data.pieces)

    def model(self) -> EncoderDecoder:
        """A new model."""
        torch.manual_seed(self.options.seed)
        sizes = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "max_length": self.data.length}
        return EncoderDecoder(vocabulary=len(self.tokenizer), **sizes, end=self.tokenizer.eos_token_id)

    def tasks(self, pairs: Pairs, shots: int, queries: int) -> Translation:
        """Tasks of some languages, all texts padded to one length, so that a captured step is recorded once."""
        length = self.data.length
        sizes = {"shots": shots, "queries": queries, "max_length": length, "multiple": length}
        return Translation(pairs, **sizes, tokenizer=self.tokenizer, seed=self.options.seed)

    def train(self, meta: metafast.MAML, tasks: Translation, lr: float, iterations: int, tasks_per_step: int) -> float:
        """Trains, and returns the seconds of it."""
        optimizer = torch.optim.Adam(meta.parameters(), lr)
        validation = self.tasks(self.data.validation, META_SHOTS, META_SHOTS)
        found = fit(
            meta,
            tasks,
            optimizer,
            iterations=iterations,
            tasks_per_step=tasks_per_step,
            clip_norm=1.0,
            validation=Validation(validation, every=max(1, iterations // 10), episodes=2) if meta.steps else None,
            progress=self.options.progress,
        )
        return found.seconds

    def translate(self, model: nn.Module, texts: Sequence[str], batch: int = 50) -> list[str]:
        """Greedy translations, in the order of ``texts``."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = [""] * len(texts)
        for first in range(0, len(texts), batch):
            numbers = order[first : first + batch]
            encoded = self.tokenizer(
                [texts[n] for n in numbers],
                padding=True,
                truncation=True,
                max_length=self.data.length,
                return_tensors="pt",
            )
            # A target of more than twice as many pieces is a repetition.
            most = min(self.data.length, 2 * encoded["input_ids"].shape[1])
            ids = model.generate(encoded["input_ids"], encoded["attention_mask"], max_new_tokens=most)
            for n, row in zip(numbers, ids, strict=True):
                found[n] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return found

    def score(self, pairs: Pairs, sentences: int, translate: Callable[[str, Sequence[str]], Sequence[str]]) -> Score:
        """Means over languages of the scores of the first sentences, by ``translate(language, texts)``."""
        import sacrebleu

        scores = []
        for name, of in pairs.items():
            sources, targets = zip(*of[:sentences], strict=True)
            found = translate(name, sources)
            of_language = (metric(found, [targets]).score for metric in (sacrebleu.corpus_chrf, sacrebleu.corpus_bleu))
            scores.append(tuple(of_language))
        return Score(*map(statistics.mean, zip(*scores, strict=True)))

    def adapt(self, model: nn.Module, way: Way, pairs: Pairs, shots: int) -> dict[str, nn.Module]:
        """The model adapted to every language on ``shots`` of its pairs."""
        rule, steps = way
        tasks = self.tasks(pairs, shots, 1)
        support, _ = next(tasks.batches(len(pairs)))
        # Every step has the next pairs; after the last ones, the first ones again.
        rows = torch.arange(steps * BATCH).view(steps, BATCH) % shots
        batches = metafast.PerStep([{name: leaf[:, of_step] for name, leaf in support.items()} for of_step in rows])
        learners = metafast.MAML(model, translation_loss, inner=RULES[rule], steps=steps).adapt(batches)
        return {tasks.language_of(n): learners.model(n) for n in range(len(pairs))}

    def score_adapted(
        self, model: nn.Module, way: Way, shots: int, pairs: Pairs, queries: Pairs, sentences: int
    ) -> Score:
        """The scores of the model, adapted to each of the languages."""
        models = self.adapt(model, way, pairs, shots)
        return self.score(queries, sentences, lambda name, texts: self.translate(models[name], texts))

    def scores(self, model: nn.Module, ways: Sequence[Way]) -> dict[int, Score]:
        """Scores on the unseen languages by the number of pairs; without any, of the model as it is."""
        data, sentences = self.data, self.options.sentences
        found = {0: self.score(data.unseen_queries, sentences, lambda _, texts: self.translate(model, texts))}
        for shots in PAIRS:
            validation = {
                way: self.score_adapted(
                    model, way, shots, data.validation, data.validation_queries, VALIDATION_SENTENCES
                ).chrf
                for way in ways
            }
            best = max(validation, key=validation.__getitem__)
            found[shots] = self.score_adapted(model, best, shots, data.unseen, data.unseen_queries, sentences)
        return found

    def rows(self) -> Iterator[Row]:
        """Trains and evaluates everything."""
        options, training = self.options, self.data.training
        unchanged = self.score(self.data.unseen_queries, options.sentences, lambda _, texts: texts)
        yield Row("source as it is", {0: unchanged}, 0, 0.0)
        yield Row("from scratch", self.scores(self.model(), FROM_SCRATCH), 0, 0.0)

        model = self.model()
        # Without an inner step, the loss of the query set is that of ordinary training.
        joint = metafast.MAML(model, translation_loss, inner=SGD(lr=0.0), steps=0)
        everything = self.tasks(training, 1, META_SHOTS)
        seconds = self.train(joint, everything, 2e-3, options.joint, 2)
        first = copy.deepcopy(model.state_dict())
        more = seconds + self.train(joint, everything, 1e-3, options.more, 2)
        yield Row("fine-tuned", self.scores(model, WAYS), options.joint + options.more, more)

        model.load_state_dict(first)
        meta = metafast.MAML(
            model, translation_loss, inner=SGD(lr=options.inner_lr), steps=STEPS, capture=options.capture
        )
        seconds += self.train(meta, self.tasks(training, META_SHOTS, META_SHOTS), 3e-4, options.meta, TASKS)
        yield Row("MAML", self.scores(model, WAYS), options.joint + options.meta, seconds)


@dataclass(frozen=True)
class Row:
    """Scores by the number of pairs."""

    name: str
    scores: Mapping[int, Score]
    iterations: int
    seconds: float

    def __str__(self) -> str:
        numbers = "".join(str(score) for score in self.scores.values())
        return f"{self.name:<16}{numbers:<68}{self.iterations:>12}{self.seconds:>9.0f}"


def draw(table: Sequence[Row], path: Path) -> None:
    """chrF by the number of pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    unchanged, *others = table
    axes.axhline(unchanged.scores[0].chrf, color="gray", linestyle=":", label=unchanged.name)
    for row in others:
        axes.plot(range(len(row.scores)), [score.chrf for score in row.scores.values()], "o-", label=row.name)
    axes.set_xticks(range(1 + len(PAIRS)), ["0", *map(str, PAIRS)])
    axes.set(xlabel="pairs of the new language", ylabel="chrF")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--data", choices=("nusax", "cldr"), default="nusax")
    parser.add_argument("--joint", type=int, default=200, help="iterations that two rows share (default: %(default)s)")
    parser.add_argument("--more", type=int, default=100, help="further ones of joint training (default: %(default)s)")
    parser.add_argument("--meta", type=int, default=40, help="meta-steps of MAML (default: %(default)s)")
    parser.add_argument("--inner-lr", type=float, default=INNER_LR, help="rate of MAML's steps (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=50, help="per test language (default: %(default)s)")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    options = parser.parse_args()

    started = time.perf_counter()
    data = (nusax if options.data == "nusax" else cldr_names)(options.folder)
    columns = "".join(f"{f'{count}: chrF':>10}{'BLEU':>7}" for count in (0, *PAIRS))
    print(f"{len(data.training)} languages train, unseen: {', '.join(data.unseen)}")
    print(f"\n{'pairs':<16}{columns}{'iterations':>12}{'seconds':>9}")
    table = []
    for row in Run(data, options).rows():
        table.append(row)
        print(row, flush=True)
    if options.figure is not None:
        draw(table, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
