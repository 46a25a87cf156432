"""From settings to an encoder of texts, classifiers on it, learners and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metafast.algorithms import ANIL, MAML, MAMLPlusPlus, MetaSGD, ProtoMAML, ProtoNet, Reptile
from metafast.algorithms.learner import MetaLearner
from metafast.commands import pretrained
from metafast.commands.settings import Settings
from metafast.inner import SGD
from metafast.models import Encoder, SentenceClassifier
from metafast.tasks import FewShot
from metafast.training import classification_loss, read_checkpoint
from metafast.training.checkpoint import check_state
from metafast.training.loop import CHECKPOINT

# The folder beside a checkpoint with the architecture and the tokenizer of a Hugging Face model.
SAVED = "model"
# Lengths of batches that are not recorded are multiples of this.
MULTIPLE = 8
# The norm of a pretrained model's sentence vectors, with which inner rates around 1 suit the head.
SCALE = 4.0
# Epochs of MAML++, of ten in a training.
EPOCHS, MULTI_STEP, FIRST_ORDER = 10, 3, 1


@dataclass(frozen=True)
class Network:
    """An encoder, and the tokenizer that reads texts for it.

    Args:
        settings: of the training.
        encoder: as :class:`metafast.models.SentenceClassifier` takes it.
        tokenizer: as :class:`metafast.tasks.FewShot` takes it; None: bytes.
        state: of a trained learner, which other learners begin with; None: untrained.
        source: the folder that the state is from.
    """

    settings: Settings
    encoder: nn.Module
    tokenizer: Callable[..., Any] | None
    state: Mapping[str, Any] | None = None
    source: Path | None = None

    @classmethod
    def new(cls, settings: Settings) -> Network:
        """The network at the start of a training.

        Raises:
            ImportError, ValueError: see :func:`metafast.commands.pretrained.load` and :class:`metafast.models.Encoder`.
        """
        if not settings.pretrained:
            return cls(settings, _of_bytes(settings), None)
        return cls._of_pretrained(settings, lambda: pretrained.load(settings.model))

    @classmethod
    def saved(cls, settings: Settings, folder: Path) -> Network:
        """The network of a run's folder, whose learners have the parameters and rates of the best validation.

        Raises:
            ImportError, ValueError: see :func:`metafast.commands.pretrained.load_saved` and
                :func:`metafast.training.read_checkpoint`.
        """
        checkpoint = read_checkpoint(folder / CHECKPOINT)
        if settings.pretrained:
            network = cls._of_pretrained(settings, lambda: pretrained.load_saved(folder / SAVED))
        else:
            network = cls.new(settings)
        return replace(network, state=checkpoint.get("best") or checkpoint["meta"], source=folder)

    @classmethod
    def _of_pretrained(cls, settings: Settings, load: Callable[[], tuple[Any, Any]]) -> Network:
        with torch.random.fork_rng([]):
            # Of weights that the model lacks.
            torch.manual_seed(settings.seed)
            encoder, tokenizer = load()
        longest = getattr(encoder.config, "max_position_embeddings", 0) // MULTIPLE * MULTIPLE
        if 0 < longest < settings.max_length:
            raise ValueError(
                f"max_length: expected at most {longest}, the tokens of the model, got {settings.max_length}"
            )
        pretrained.train_last(encoder, settings.trained_layers)
        return cls(settings, encoder, tokenizer)

    def save(self, folder: Path) -> None:
        """Writes to a run's folder what :meth:`saved` reads. Raises OSError where it cannot be written."""
        if self.settings.pretrained:
            pretrained.save(self.encoder, self.tokenizer, folder / SAVED)

    def learner(self, ways: int) -> MetaLearner:
        """A learner of this network and the settings' algorithm, for tasks of so many classes.

        Raises:
            ValueError: the state is of another architecture or number of classes.
        """
        meta = self._untrained(ways)
        if self.state is not None:
            assert self.source is not None
            check_state(meta, self.state, self.source)
            meta.load_state_dict(self.state)
        return meta

    def _untrained(self, ways: int) -> MetaLearner:
        settings = self.settings
        model = SentenceClassifier(
            self.encoder,
            None if settings.by_prototypes else ways,
            width=None if settings.pretrained else settings.width,
            normalize=settings.pretrained,
            scale=SCALE if settings.pretrained else 1.0,
        )
        if settings.algorithm == "protonet":
            return ProtoNet(model, classification_loss, ways=ways)
        inner: dict[str, Any] = {"inner": SGD(lr=settings.inner_lr), "steps": settings.steps}
        if settings.algorithm == "protomaml":
            return ProtoMAML(model, classification_loss, ways=ways, **inner)
        if settings.algorithm == "anil":
            return ANIL(model, classification_loss, head="head.*", **inner)
        inner["adapt_parameters"] = "head.*" if settings.adapt == "head" else None
        if settings.algorithm == "maml++":
            inner |= {"multi_step_epochs": MULTI_STEP, "first_order_epochs": FIRST_ORDER}
            return MAMLPlusPlus(model, classification_loss, **inner)
        if settings.algorithm == "reptile":
            return Reptile(model, classification_loss, **inner)
        if settings.algorithm == "metasgd":
            return MetaSGD(model, classification_loss, **inner)
        return MAML(model, classification_loss, order=1 if settings.algorithm == "fomaml" else 2, **inner)

    def tasks(self, texts: Mapping[str, Sequence[str]], seed: int) -> FewShot:
        """Tasks of some classes, of the settings' sizes.

        Raises:
            ValueError: see :class:`metafast.tasks.FewShot`.
        """
        settings = self.settings
        return FewShot(
            texts,
            ways=settings.ways,
            shots=settings.shots,
            queries=settings.queries,
            tokenizer=self.tokenizer,
            max_length=settings.max_length,
            seed=seed,
            # A step over bytes is recorded, once where all batches have one length.
            multiple=MULTIPLE if settings.pretrained else settings.max_length,
        )


def _of_bytes(settings: Settings) -> Encoder:
    """A new encoder, which depends on the seed alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        encoder = Encoder(
            width=settings.width, layers=settings.layers, heads=settings.heads, max_length=settings.max_length
        )
        for embedding in (encoder.tokens, encoder.positions):
            nn.init.normal_(embedding.weight, std=0.1)
    return encoder
