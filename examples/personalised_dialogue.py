"""Personalised dialogue: a language model that adapts to a person on the person's first turns.

    python examples/personalised_dialogue.py --figure dialogue.png

It needs the extra ``examples``, and ``persona_chat``, which ``metafast.tasks.corpora`` describes, in the folder
``--folder`` (or METAFAST_DATA, or ../shared/data). A task is a person: the first turns are learned from, the next ones
predicted. People of ``valid.csv`` train and validate, those of ``test.csv`` test.

All rows start from the same model, trained jointly on all training people. Then, for about the same time,

- "one for all" goes on with joint training, and is not adapted;
- "fine-tuned" is that model, adapted with the learning rate and the number of steps that are best for validation people;
- "MAML" is meta-trained, with a learned rate per tensor, so that one step on a person's turns helps most.

The table has the perplexity of later turns before and after adaptation, the share of people for whom it falls, the
perplexity after adapting on the turns of somebody else, and the share of people whose own turns help more.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import metafast
from metafast.inner import SGD
from metafast.models import Decoder
from metafast.tasks import Dialogue, Episode, Tasks, corpora
from metafast.training import Validation, evaluate, fit, language_model_loss

PIECES, LENGTH, WIDTH, LAYERS = 1000, 48, 128, 2
QUERIES = 4
# What fine-tuning chooses from.
RATES, STEPS = (0.03, 0.1, 0.3, 1.0), (1, 3)


class SomebodyElse(Tasks):
    """The tasks of a source, each with the support set of the next one."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks.seed, tasks.multiple)
        self.tasks, self.padding = tasks, tasks.padding

    def __getitem__(self, number: int) -> Episode:
        return Episode(self.tasks[number + 1].support, self.tasks[number].query)


@dataclass(frozen=True)
class Row:
    """Mean losses of the later turns of every person, float64 ``[people]``, and the iterations and seconds of training."""

    name: str
    before: Tensor
    after: Tensor
    somebody_else: Tensor
    iterations: int
    seconds: float

    def __str__(self) -> str:
        perplexities = [math.exp(losses.mean()) for losses in (self.before, self.after, self.somebody_else)]
        falls = (self.after < self.before).double().mean()
        own = (self.after < self.somebody_else).double().mean()
        numbers = "".join(f"{value:>10.2f}" for value in perplexities)
        return f"{self.name:<14}{numbers}{falls:>10.1%}{own:>10.1%}{self.iterations:>12}{self.seconds:>9.0f}"


HEADER = f"{'':<14}{'before':>10}{'after':>10}{'else':>10}{'falls':>10}{'own':>10}{'iterations':>12}{'seconds':>9}"


def people_of(folder: Path, turns: int) -> tuple[Mapping, Mapping, Mapping]:
    """People with enough turns: for training, a tenth of them for validation, and for testing."""
    known, test = corpora.persona_chat(folder)
    known, test = ({name: said for name, said in people.items() if len(said) >= turns} for people in (known, test))
    names = list(known)
    held_out = max(1, len(names) // 10)
    # Both people of a conversation are on one side: they are neighbours.
    training = {name: known[name] for name in names[:-held_out] if name.split(",")[0] != names[-held_out].split(",")[0]}
    return training, {name: known[name] for name in names[-held_out:]}, test


def measured(name: str, meta: metafast.MAML, test: Tasks, people: int, iterations: int, seconds: float) -> Row:
    """Evaluates on test people, on their own turns and on somebody else's."""
    own = evaluate(meta, test, people, steps={0, meta.steps}).values["loss"]
    other = evaluate(meta, SomebodyElse(test), people, steps=[meta.steps]).values["loss"]
    return Row(name, own[0], own[meta.steps], other[meta.steps], iterations, seconds)


def rows(parts: Sequence[Mapping], options: argparse.Namespace) -> Iterator[Row]:
    """Trains and evaluates everything."""
    from metafast.integrations.word_pieces import learn_word_pieces

    torch.manual_seed(options.seed)
    tokenizer = learn_word_pieces((text for said in parts[0].values() for pair in said for text in pair), PIECES)
    sizes = {"tokenizer": tokenizer, "max_length": LENGTH, "multiple": LENGTH}
    training, validation, test = (
        Dialogue(part, shots=options.turns, queries=QUERIES, learn_heard=True, **sizes, seed=3 * options.seed + number)
        for number, part in enumerate(parts)
    )
    everything = Dialogue(parts[0], shots=1, queries=options.turns + QUERIES - 1, **sizes, seed=options.seed)
    people = min(options.people, len(test.names))
    checks = {"episodes": min(100, len(validation.names))}
    model = Decoder(
        vocabulary=len(tokenizer), width=WIDTH, layers=LAYERS, max_length=LENGTH, end=tokenizer.eos_token_id
    )

    def train(meta: metafast.MAML, tasks: Tasks, lr: float, iterations: int) -> float:
        # Logarithms of inner rates move much further than weights do.
        groups = [{"params": meta.model.parameters()}, {"params": meta.rates.parameters(), "lr": 0.03}]
        optimizer = torch.optim.Adam(groups, lr)
        every = max(1, iterations // 5)
        found = fit(
            meta,
            tasks,
            optimizer,
            iterations=iterations,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations),
            clip_norm=1.0,
            validation=Validation(validation, every=every, **checks),
            progress=options.progress,
        )
        return found.seconds

    # Without an inner step, the loss of the query set is that of ordinary training.
    joint = metafast.MAML(model, language_model_loss, inner=SGD(lr=0.0), steps=0)
    started = train(joint, everything, 3e-3, options.joint)
    first = {name: value.clone() for name, value in model.state_dict().items()}

    seconds = started + train(joint, everything, 1e-3, options.more)
    found = evaluate(joint, test, people, steps=[0]).values["loss"][0]
    yield Row("one for all", found, found, found, options.joint + options.more, seconds)
    ways = [(lr, steps) for lr in RATES for steps in STEPS]
    tuners = [metafast.MAML(model, language_model_loss, inner=SGD(lr=lr), steps=steps) for lr, steps in ways]
    best = min(tuners, key=lambda tuner: evaluate(tuner, validation, **checks).interval("loss").mean)
    yield measured("fine-tuned", best, test, people, options.joint + options.more, seconds)

    model.load_state_dict(first)
    # A rate per tensor, learned: the head has to learn faster than what is beneath.
    rule = SGD(lr=options.inner_lr, learn={"lr": "tensor"}, learn_log=True)
    meta = metafast.MAML(model, language_model_loss, inner=rule, steps=1, capture=options.capture)
    seconds = started + train(meta, training, 1e-3, options.meta)
    yield measured("MAML", meta, test, people, options.joint + options.meta, seconds)


def draw(table: Sequence[Row], path: Path) -> None:
    """How much the loss of each person falls: on own turns, and on somebody else's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for row in table[1:]:
        for losses, label, line in ((row.after, "own turns", "-"), (row.somebody_else, "somebody else's", ":")):
            falls = (row.before - losses).sort().values
            shares = torch.linspace(0, 1, len(falls))
            axes.plot(falls, shares, line, label=f"{row.name}, {label}")
    axes.axvline(0, color="gray", linewidth=0.5)
    axes.set(xlabel="fall of the mean loss per token by adapting", ylabel="share of people below")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="turns to learn from (default: %(default)s)")
    parser.add_argument("--joint", type=int, default=1000, help="iterations that all rows share (default: %(default)s)")
    parser.add_argument("--more", type=int, default=900, help="further ones of joint training (default: %(default)s)")
    parser.add_argument("--meta", type=int, default=300, help="meta-steps of MAML (default: %(default)s)")
    parser.add_argument("--inner-lr", type=float, default=0.1, help="first rate of MAML's step (default: %(default)s)")
    parser.add_argument("--people", type=int, default=500, help="test people (default: %(default)s)")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    options = parser.parse_args()

    started = time.perf_counter()
    parts = people_of(options.folder / "persona_chat", options.turns + QUERIES)
    print(
        f"people: {', '.join(str(len(part)) for part in parts)}; {options.turns} turns to learn from\n\n{HEADER}",
        flush=True,
    )
    table = []
    for row in rows(parts, options):
        table.append(row)
        print(row, flush=True)
    if options.figure is not None:
        draw(table, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
