"""The inner loop as everybody writes it, one task after another: what the learners' tests compare with."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree


def at(model, params):
    """The model as a function of its inputs, with these parameters."""
    return lambda *inputs, **named: functional_call(model, params, inputs, named)


def task(batch, index):
    return pytree.tree_map(lambda leaf: leaf[index], batch)


def adaptation(model, loss_fn, support, steps, lr, *, names=None, create_graph=True):
    """One task's parameters before the first step and after each.

    Args:
        support: of one task, or a list of one per step.
        lr: number, or ``lr(step, name)``.
        names: what is adapted; None: all that requires a gradient.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = list(params) if names is None else names
    found = [dict(params)]
    for step in range(steps):
        loss = loss_fn(at(model, params), support[step] if isinstance(support, list) else support)
        grads = torch.autograd.grad(
            loss, [params[name] for name in names], create_graph=create_graph, materialize_grads=True
        )
        params = dict(params)
        for name, grad in zip(names, grads, strict=True):
            params[name] = params[name] - (lr(step, name) if callable(lr) else lr) * grad
        found.append(params)
    return found


def query_losses(model, loss_fn, support, query, steps, lr, *, step_weights=None, **options):
    """Every task's query loss, [T], or its weighted sum over steps."""
    losses = []
    for index in range(len(pytree.tree_leaves(query)[0])):
        own = [task(batch, index) for batch in support] if isinstance(support, list) else task(support, index)
        found = adaptation(model, loss_fn, own, steps, lr, **options)
        weights = [0.0] * steps + [1.0] if step_weights is None else [0.0, *step_weights]
        parts = [w * loss_fn(at(model, p), task(query, index)) for w, p in zip(weights, found, strict=True) if w != 0]
        losses.append(torch.stack(parts).sum())
    return torch.stack(losses)


def gradients(loss, params):
    return torch.autograd.grad(loss, list(params), materialize_grads=True)


def meta_gradients(meta, *batches, params=None, **options):
    """The loss of a call, and what its backward leaves in these parameters (None: all of the learner)."""
    meta.zero_grad()
    loss = meta(*batches, **options)
    loss.backward()
    params = [p for p in meta.parameters() if p.requires_grad] if params is None else list(params)
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over all tensors."""
    difference = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return (difference / torch.stack([b.norm() for b in expected]).norm()).item()
