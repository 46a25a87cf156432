"""Torch's own database of modules with inputs, and the modules that it leaves out, as models for several tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

TASKS = 3


class Case(NamedTuple):
    """A module with inputs of its own for every task.

    Attributes:
        name: of the module's class, and which sample.
        make: a new module, on its way to float64.
        draws: positional and keyword arguments, a pair for each task of a batch, batch after batch.
    """

    name: str
    make: Callable[[], nn.Module]
    draws: list[tuple[tuple[Any, ...], dict[str, Any]]]
    training: bool


class Around(nn.Module):
    """A module with parameters in front of its floating inputs: a factor between 0 and 1 for each of their last dimension.

    Domains are kept: probabilities stay such, variances positive. It gives all floating outputs.

    Args:
        arguments: of the module; those that are no tensors are the same at every call.
        scaled: how many of the floating inputs have a factor, from the first.
    """

    def __init__(self, module: nn.Module, arguments: Any, scaled: int) -> None:
        super().__init__()
        self.module = module
        tensors, self._rebuilt = tensors_of(arguments)
        floating = [i for i, x in enumerate(tensors) if x.is_floating_point() and not x.isinf().any()]
        self._scaled = floating[:scaled]
        self.factors = nn.ParameterList(torch.randn(tensors[i].shape[-1:]) for i in self._scaled)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = list(tensors)
        for i, factor in zip(self._scaled, self.factors, strict=True):
            tensors[i] = tensors[i] * factor.sigmoid()
        args, kwargs = self._rebuilt(tensors)
        return floating_leaves(self.module(*args, **kwargs))


def loss_fn(model: Callable[..., Any], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Smooth, bounded in its slopes, and other for every element of the outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for output in model(*batch):
        weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).reshape(output.shape) + 0.3
        total = total + (weights * (output.square() + output + 2.0).log()).sum() / output.numel() ** 0.5
    return total


def floating_leaves(result: Any) -> tuple[torch.Tensor, ...]:
    leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in pytree.tree_leaves(result)]
    return tuple(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel())


def tensors_of(arguments: Any) -> tuple[list[torch.Tensor], Callable[[list[torch.Tensor]], Any]]:
    """The tensors in a module's arguments, and what puts others in their places."""
    leaves, structure = pytree.tree_flatten(arguments)

    def rebuilt(tensors: list[torch.Tensor]) -> Any:
        given = iter(tensors)
        values = [
            leaf._replace(data=next(given))
            if isinstance(leaf, PackedSequence)
            else next(given)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
        return pytree.tree_unflatten(values, structure)

    found = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [leaf.detach() for leaf in found if isinstance(leaf, torch.Tensor)], rebuilt


def batches(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """The case's draws as batches of tasks."""
    draws = [[_defined(x) for x in tensors_of(draw)[0]] for draw in case.draws]
    groups = [draws[first : first + TASKS] for first in range(0, len(draws), TASKS)]
    return [tuple(torch.stack(column) for column in zip(*group, strict=True)) for group in groups]


def model_of(case: Case, scaled: int) -> Around:
    """A model in float64 whose parameters are all random, as after training."""
    module = case.make().double()
    args, kwargs = copy.deepcopy(case.draws[0])
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in (*module.parameters(), *module.buffers())):
        module(*args, **kwargs)
    model = Around(module, (args, kwargs), scaled).double().train(case.training)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def database(name: str, draws: int) -> list[Case]:
    """The cases of one module of torch's database, those of training first."""
    (info,) = (info for info in module_db if info.name == name)
    found = []
    for training in (True, False):
        pools = [
            list(info.module_inputs_func(info, "cpu", torch.float64, requires_grad=False, training=training))
            for _ in range(draws)
        ]
        for index, sample in enumerate(pools[0]):
            inputs = [(pool[index].forward_input.args, pool[index].forward_input.kwargs) for pool in pools]
            label = f"{name} #{index} {sample.desc} {'train' if training else 'eval'}"
            found.append(Case(label, _maker(info.module_cls, sample.constructor_input), inputs, training))
    return found


def _maker(kind: Any, given: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*copy.deepcopy(given.args), **copy.deepcopy(given.kwargs))


def _defined(x: torch.Tensor) -> torch.Tensor:
    """Without the NaN that some samples have for logarithms of negative numbers."""
    return torch.where(x.isnan(), -torch.rand_like(x) - 0.1, x) if x.is_floating_point() else x


def names() -> list[str]:
    return [info.name for info in module_db]


class Extra(NamedTuple):
    """A module that the database leaves out, or options of one, and how its arguments are drawn."""

    make: Callable[[], nn.Module]
    draw: Callable[[], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = MappingProxyType({})


def extras(name: str, draws: int) -> list[Case]:
    """The cases beside the database of one name."""
    extra = EXTRAS[name]
    return [
        Case(
            f"{name} {'train' if training else 'eval'}",
            extra.make,
            [(extra.draw(), dict(extra.kwargs)) for _ in range(draws)],
            training,
        )
        for training in (True, False)
    ]


def _x(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def _xs(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def _ids(*shape: int, below: int = 4) -> Callable[[], tuple[Any, ...]]:
    """Ids among which 0 and equal ones always are, at other places in every draw."""

    def draw() -> tuple[Any, ...]:
        ids = torch.randint(below, shape)
        ids.view(-1)[torch.randperm(ids.numel())[: max(ids.numel() // 3, 1)]] = 0
        return (ids,)

    return draw


def _bags(weighted: bool = False) -> Callable[[], tuple[Any, ...]]:
    def draw() -> tuple[Any, ...]:
        (ids,) = _ids(7)()
        bags = (ids, torch.tensor([0, 2, 2, 5]))
        return (*bags, torch.rand(7, dtype=torch.float64)) if weighted else bags

    return draw


def _classified(*shape: int, ignored: int | None = None, classes: int = 5) -> Callable[[], tuple[Any, ...]]:
    """Inputs ``[n, classes, …]`` and labels ``[n, …]``, another number of them ignored in every draw."""

    def draw() -> tuple[Any, ...]:
        labels = torch.randint(classes, (shape[0], *shape[1:]))
        if ignored is not None:
            labels.view(-1)[torch.randperm(labels.numel())[: int(torch.randint(labels.numel(), ()))]] = ignored
        # Torch's mean of no example is NaN. The last class is not ignored and has a weight.
        labels.view(-1)[int(torch.randint(labels.numel(), ()))] = classes - 1
        return torch.randn(shape[0], classes, *shape[1:], dtype=torch.float64), labels

    return draw


def _multi_labels() -> tuple[Any, ...]:
    targets = torch.full((4, 5), -1)
    for row in range(4):
        count = int(torch.randint(1, 5, ()))
        targets[row, :count] = torch.randperm(5)[:count]
    return torch.randn(4, 5, dtype=torch.float64), targets


def _pooled(dims: int, shape: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2, return_indices=True)
    return lambda: pool(torch.randn(*shape, dtype=torch.float64))


def _near(distance: float) -> Callable[[], tuple[Any, ...]]:
    def draw() -> tuple[Any, ...]:
        x = torch.randn(4, 5, dtype=torch.float64)
        return x, x + distance * torch.randn(4, 5, dtype=torch.float64)

    return draw


def _masked(length: int) -> Callable[[], tuple[Any, ...]]:
    """Inputs and a padding mask that leaves at least one place, for ``TransformerEncoder(src, None, padding)``."""

    def draw() -> tuple[Any, ...]:
        padding = torch.rand(2, length) < 0.4
        padding[:, 0] = False
        return torch.randn(2, length, 8, dtype=torch.float64), None, padding

    return draw


def _zeroed_weights() -> torch.Tensor:
    weights = torch.rand(5, dtype=torch.float64)
    weights[:2] = 0.0
    return weights


def _layer(kind: Any, **options: Any) -> nn.Module:
    return kind(8, 2, 12, dropout=0.0, batch_first=True, **options)


def _encoder(**options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, **options), 2)


_causal = torch.ones(3, 3, dtype=torch.bool).triu(1)

EXTRAS: dict[str, Extra] = {
    "Embedding padded": Extra(lambda: nn.Embedding(4, 3, padding_idx=0), _ids(2, 5)),
    "Embedding padded from the end": Extra(lambda: nn.Embedding(4, 3, padding_idx=-4), _ids(2, 5)),
    "Embedding by frequency": Extra(lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), _ids(2, 5)),
    "Embedding by frequency, padded": Extra(
        lambda: nn.Embedding(4, 3, padding_idx=0, scale_grad_by_freq=True), _ids(2, 5)
    ),
    "Embedding of bounded norm": Extra(lambda: nn.Embedding(4, 3, max_norm=0.7), _ids(2, 5)),
    "Embedding of bounded norm, padded": Extra(lambda: nn.Embedding(4, 3, max_norm=0.7, padding_idx=0), _ids(2, 5)),
    "Embedding sparse": Extra(lambda: nn.Embedding(4, 3, sparse=True), _ids(2, 5)),
    "Embedding sparse, padded": Extra(lambda: nn.Embedding(4, 3, sparse=True, padding_idx=0), _ids(2, 5)),
    "Embedding of one id": Extra(lambda: nn.Embedding(4, 3, padding_idx=0), _ids(1)),
    "EmbeddingBag": Extra(lambda: nn.EmbeddingBag(4, 3), _ids(2, 5)),
    "EmbeddingBag sum": Extra(lambda: nn.EmbeddingBag(4, 3, mode="sum", padding_idx=0), _ids(2, 5)),
    "EmbeddingBag max": Extra(lambda: nn.EmbeddingBag(4, 3, mode="max"), _ids(2, 5)),
    "EmbeddingBag offsets": Extra(lambda: nn.EmbeddingBag(4, 3, mode="mean"), _bags()),
    "EmbeddingBag weighted": Extra(lambda: nn.EmbeddingBag(4, 3, mode="sum"), _bags(weighted=True)),
    "EmbeddingBag by frequency": Extra(lambda: nn.EmbeddingBag(4, 3, scale_grad_by_freq=True), _ids(2, 5)),
    "EmbeddingBag sparse": Extra(lambda: nn.EmbeddingBag(4, 3, sparse=True, mode="sum"), _ids(2, 5)),
    "EmbeddingBag of bounded norm": Extra(lambda: nn.EmbeddingBag(4, 3, max_norm=0.7), _ids(2, 5)),
    "CrossEntropyLoss ignoring": Extra(lambda: nn.CrossEntropyLoss(ignore_index=1), _classified(6, ignored=1)),
    "CrossEntropyLoss ignoring -100": Extra(nn.CrossEntropyLoss, _classified(6, ignored=-100)),
    "CrossEntropyLoss ignoring, smoothed": Extra(
        lambda: nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.2), _classified(6, ignored=1)
    ),
    "CrossEntropyLoss ignoring, summed": Extra(
        lambda: nn.CrossEntropyLoss(ignore_index=-1, reduction="sum"), _classified(6, 3, ignored=-1)
    ),
    "CrossEntropyLoss of weights 0": Extra(lambda: nn.CrossEntropyLoss(_zeroed_weights()), _classified(9)),
    "CrossEntropyLoss of weights 0, ignoring": Extra(
        lambda: nn.CrossEntropyLoss(_zeroed_weights(), ignore_index=3, label_smoothing=0.1),
        _classified(4, 3, ignored=3),
    ),
    "CrossEntropyLoss of weights 0, elements": Extra(
        lambda: nn.CrossEntropyLoss(_zeroed_weights(), ignore_index=-1, reduction="none"),
        _classified(4, 3, ignored=-1),
    ),
    "NLLLoss of weights 0": Extra(lambda: nn.NLLLoss(_zeroed_weights()), _classified(9)),
    "NLLLoss ignoring, images": Extra(
        lambda: nn.NLLLoss(_zeroed_weights(), ignore_index=2), _classified(2, 3, 3, ignored=2)
    ),
    "KLDivLoss": Extra(
        lambda: nn.KLDivLoss(reduction="batchmean"),
        lambda: (torch.randn(4, 5).double().log_softmax(-1), torch.randn(4, 5).double().softmax(-1)),
    ),
    "MultiLabelMarginLoss": Extra(nn.MultiLabelMarginLoss, _multi_labels),
    "MultiMarginLoss weighted": Extra(lambda: nn.MultiMarginLoss(weight=_zeroed_weights()), _classified(6)),
    "AdaptiveLogSoftmaxWithLoss": Extra(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]), lambda: (*_x(5, 4)(), torch.randint(6, (5,)))
    ),
    "TripletMarginLoss": Extra(nn.TripletMarginLoss, _xs((4, 5), (4, 5), (4, 5))),
    "TripletMarginLoss swapped": Extra(lambda: nn.TripletMarginLoss(swap=True, p=1.0), _xs((4, 5), (4, 5), (4, 5))),
    "TripletMarginWithDistanceLoss": Extra(
        lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance()), _xs((4, 5), (4, 5), (4, 5))
    ),
    "CosineSimilarity": Extra(nn.CosineSimilarity, _xs((4, 5), (4, 5))),
    "PairwiseDistance": Extra(nn.PairwiseDistance, _xs((4, 5), (4, 5))),
    "PairwiseDistance of equal ones": Extra(nn.PairwiseDistance, _near(0.0)),
    "MaxUnpool1d": Extra(lambda: nn.MaxUnpool1d(2), _pooled(1, (2, 3, 6))),
    "MaxUnpool2d": Extra(lambda: nn.MaxUnpool2d(2), _pooled(2, (2, 3, 4, 4))),
    "MaxUnpool3d": Extra(lambda: nn.MaxUnpool3d(2), _pooled(3, (2, 3, 4, 4, 4))),
    "Fold": Extra(lambda: nn.Fold((4, 5), 2), _x(2, 12, 12)),
    "Unfold": Extra(lambda: nn.Unfold(2, dilation=2, padding=1, stride=2), _x(2, 3, 4, 5)),
    "PixelShuffle": Extra(lambda: nn.PixelShuffle(2), _x(2, 8, 3, 2)),
    "PixelUnshuffle": Extra(lambda: nn.PixelUnshuffle(2), _x(2, 3, 4, 2)),
    "ChannelShuffle": Extra(lambda: nn.ChannelShuffle(2), _x(2, 4, 3, 2)),
    "Upsample nearest": Extra(lambda: nn.Upsample(scale_factor=2), _x(2, 3, 4)),
    "Upsample bilinear": Extra(lambda: nn.Upsample((5, 7), mode="bilinear", align_corners=True), _x(2, 3, 4, 3)),
    "Upsample bicubic": Extra(lambda: nn.Upsample((5, 7), mode="bicubic"), _x(2, 3, 4, 3)),
    "Upsample trilinear": Extra(lambda: nn.Upsample(scale_factor=1.5, mode="trilinear"), _x(2, 2, 2, 2, 4)),
    "Hardsigmoid": Extra(nn.Hardsigmoid, _x(3, 4)),
    "RReLU": Extra(nn.RReLU, _x(3, 4)),
    "CrossMapLRN2d": Extra(lambda: nn.CrossMapLRN2d(3), _x(2, 4, 3, 3)),
    "Flatten": Extra(nn.Flatten, _x(2, 3, 4)),
    "Unflatten": Extra(lambda: nn.Unflatten(1, (2, 3)), _x(2, 6, 4)),
    "Identity": Extra(nn.Identity, _x(2, 3)),
    "Dropout": Extra(nn.Dropout, _x(4, 5)),
    "Dropout1d": Extra(nn.Dropout1d, _x(4, 5, 3)),
    "Dropout2d": Extra(nn.Dropout2d, _x(4, 5, 3, 3)),
    "Dropout3d": Extra(nn.Dropout3d, _x(4, 5, 2, 2, 2)),
    "AlphaDropout": Extra(nn.AlphaDropout, _x(4, 5)),
    "FeatureAlphaDropout": Extra(nn.FeatureAlphaDropout, _x(4, 5, 3)),
    "LazyLinear": Extra(lambda: nn.LazyLinear(3), _x(4, 5)),
    "LazyBatchNorm1d": Extra(nn.LazyBatchNorm1d, _x(4, 5)),
    "LazyInstanceNorm2d": Extra(lambda: nn.LazyInstanceNorm2d(affine=True), _x(2, 3, 4, 4)),
    "BatchNorm1d averaging all": Extra(lambda: nn.BatchNorm1d(5, momentum=None), _x(4, 5)),
    "BatchNorm1d without statistics": Extra(lambda: nn.BatchNorm1d(5, track_running_stats=False), _x(4, 5, 3)),
    "BatchNorm2d not affine": Extra(lambda: nn.BatchNorm2d(3, affine=False), _x(2, 3, 4, 4)),
    "InstanceNorm1d with statistics": Extra(
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), _x(2, 3, 5)
    ),
    "GroupNorm of images": Extra(lambda: nn.GroupNorm(2, 4), _x(2, 4, 3, 3)),
    "LayerNorm without bias": Extra(lambda: nn.LayerNorm((3, 4), bias=False), _x(2, 3, 4)),
    "RMSNorm": Extra(lambda: nn.RMSNorm(4), _x(2, 3, 4)),
    "Conv1d in groups": Extra(lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), _x(2, 4, 5)),
    "Conv1d by depth": Extra(lambda: nn.Conv1d(4, 8, 3, groups=4, padding=2, padding_mode="circular"), _x(2, 4, 5)),
    "Conv2d in groups, dilated": Extra(
        lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=2, stride=2, padding_mode="reflect", padding=1), _x(2, 4, 5, 6)
    ),
    "Conv3d in groups": Extra(lambda: nn.Conv3d(2, 4, 2, groups=2, bias=False), _x(2, 2, 3, 3, 3)),
    "ConvTranspose1d in groups": Extra(
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1), _x(2, 4, 5)
    ),
    "ConvTranspose2d in groups": Extra(lambda: nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=2), _x(2, 4, 3, 3)),
    "Conv1d of one example": Extra(lambda: nn.Conv1d(4, 6, 3, groups=2), _x(4, 5)),
    "LSTM projected": Extra(lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, batch_first=True), _x(2, 5, 3)),
    "LSTM with state": Extra(lambda: nn.LSTM(3, 4), lambda: (_x(5, 2, 3)()[0], (_x(1, 2, 4)()[0], _x(1, 2, 4)()[0]))),
    "GRU bidirectional": Extra(lambda: nn.GRU(3, 4, 2, bidirectional=True, dropout=0.0), _x(5, 2, 3)),
    "RNN with dropout": Extra(lambda: nn.RNN(3, 4, 2, dropout=0.4), _x(5, 2, 3)),
    "MultiheadAttention biased": Extra(
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        _xs((2, 3, 8), (2, 4, 8), (2, 4, 8)),
    ),
    "MultiheadAttention of other sizes": Extra(
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True), _xs((2, 3, 8), (2, 4, 5), (2, 4, 6))
    ),
    "MultiheadAttention without weights": Extra(
        lambda: nn.MultiheadAttention(8, 4), _xs((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"need_weights": False}
    ),
    "TransformerEncoder": Extra(_encoder, _x(2, 3, 8)),
    "TransformerEncoder padded": Extra(_encoder, _masked(3)),
    "TransformerEncoder padded, norm first": Extra(
        lambda: _encoder(norm_first=True, activation="gelu", bias=False), _masked(3)
    ),
    "TransformerEncoder causal": Extra(_encoder, _x(2, 3, 8), {"mask": _causal}),
    "TransformerEncoder causal by name": Extra(_encoder, _x(2, 3, 8), {"mask": _causal, "is_causal": True}),
    "TransformerDecoder": Extra(
        lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2),
        _xs((2, 3, 8), (2, 4, 8)),
        {"tgt_mask": _causal},
    ),
    "Transformer": Extra(
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True), _xs((2, 4, 8), (2, 3, 8))
    ),
    "parametrized by weight_norm": Extra(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64)), _x(5, 4)
    ),
    "parametrized by orthogonal": Extra(
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3, dtype=torch.float64)), _x(5, 4)
    ),
    "parametrized by spectral_norm": Extra(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3, dtype=torch.float64)), _x(5, 4)
    ),
}
