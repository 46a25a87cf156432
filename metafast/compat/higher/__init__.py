"""Inner loops of higher (Grefenstette et al., arXiv 1910.01727, release 0.2.1) over this library's ops.

Attention inside the patched model is this library's, which can be differentiated twice, and a step of an optimizer is one
call for all its parameters. Arguments and behaviour are higher's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from metafast.acceleration import replaced_names
from metafast.compat.calls import called
from metafast.compat.higher.optim import DifferentiableOptimizer, Override
from metafast.compat.higher.patch import Functional, monkeypatch

__all__ = ["innerloop_ctx"]


@contextlib.contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """``higher.innerloop_ctx``: a functional copy of a model and a differentiable version of its optimizer.

    For example::

        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            diffopt.step(loss(fmodel(x), y))
            loss(fmodel(query_x), query_y).backward()  # the meta-gradient, in model's parameters

    All attention that this thread computes inside the block is this library's; see :func:`metafast.accelerate`.
    :class:`metafast.MAML` runs many tasks side by side, with ``checkpoint=True`` in the memory of one step.

    Args:
        model: any module; neither its parameters nor its buffers change.
        opt: ``torch.optim.SGD``, ``Adam``, ``AdamW`` or ``RMSprop`` of its parameters, with any number of groups. The inner
            loop starts from its state.
        device: device of the copy; None: the model's.
        copy_initial_weights: True: start from copies without a graph. False: start from the model's parameters, which then
            get the meta-gradient.
        override: settings of the groups in the inner loop, by name: a list with one value for all groups or one for each.
            ``lr`` and ``weight_decay`` may be tensors, and get gradients.
        track_higher_grads: False keeps no graph of the steps: for evaluation.

    Yields:
        ``fmodel``, a module of the model's class whose call takes ``params=`` as well, and with ``fast_params``,
        ``init_fast_params``, ``parameters(time=)`` and ``update_params``; and ``diffopt``, with ``step(loss)``.

    Raises:
        TypeError, ValueError: another optimizer, or a setting that is not as above; the message lists what is served.
    """
    fmodel: Functional = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = DifferentiableOptimizer(
        opt, list(model.parameters()), fmodel, device, override=override, track_higher_grads=track_higher_grads
    )
    with called(fmodel, replaced_names(model)):
        yield fmodel, diffopt


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{__name__} has {', '.join(__all__)}, and no {name!r}: take that from higher itself")
