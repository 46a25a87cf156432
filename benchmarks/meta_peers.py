"""A meta-gradient as it is computed without metafast: ``peer(model, support, query, steps, algorithm)``.

The inner loop is SGD with rate LR on cross-entropy. "MAML" is of second order, "FOMAML" and "Reptile" are of first order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

LR = 0.1


def loss_of(model, params, batch):
    return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1])


def meta_gradient(model, adapted, loss, algorithm):
    """Of one task, from its adapted parameters and its query loss; ``loss`` is a function since Reptile needs none."""
    start = list(model.parameters())
    if algorithm == "Reptile":
        return [p.detach() - a.detach() for p, a in zip(start, adapted, strict=True)]
    return torch.autograd.grad(loss(), start if algorithm == "MAML" else list(adapted))


def mean_over_tasks(one_task, support, query):
    tasks = len(support[0])
    sums: list[torch.Tensor] = []
    for t in range(tasks):
        grads = one_task(*((x[t], y[t]) for x, y in (support, query)))
        if sums:
            torch._foreach_add_(sums, grads)
        else:
            sums = list(grads)
    torch._foreach_div_(sums, tasks)
    return sums


def loop(model, support, query, steps, algorithm):
    """Plain torch, one task after another."""

    def one_task(support, query):
        params = dict(model.named_parameters())
        for _ in range(steps):
            loss = loss_of(model, params, support)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=algorithm == "MAML")
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return meta_gradient(model, params.values(), lambda: loss_of(model, params, query), algorithm)

    return mean_over_tasks(one_task, support, query)


def higher(model, support, query, steps, algorithm):
    import higher as library

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def one_task(support, query):
        second = algorithm == "MAML"
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False, track_higher_grads=second) as (
            net,
            inner,
        ):
            for _ in range(steps):
                inner.step(F.cross_entropy(net(support[0]), support[1]))
            adapted = list(net.parameters())
            return meta_gradient(model, adapted, lambda: F.cross_entropy(net(query[0]), query[1]), algorithm)

    return mean_over_tasks(one_task, support, query)


def torchopt(model, support, query, steps, algorithm):
    """Its functional optimizer: what its modules' ``step`` wraps."""
    import torchopt as library

    optimizer = library.sgd(LR)

    def one_task(support, query):
        params = dict(model.named_parameters())
        state = optimizer.init(params)
        for _ in range(steps):
            loss = loss_of(model, params, support)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=algorithm == "MAML")
            updates, state = optimizer.update(
                dict(zip(params, grads, strict=True)), state, params=params, inplace=False
            )
            params = library.apply_updates(params, updates, inplace=False)
        return meta_gradient(model, params.values(), lambda: loss_of(model, params, query), algorithm)

    return mean_over_tasks(one_task, support, query)


def func(model, support, query, steps, algorithm):
    """``torch.func``: the tasks side by side under vmap."""
    start = {name: p.detach() for name, p in model.named_parameters()}

    def adapted(params, support):
        for _ in range(steps):
            grads = grad(lambda p: loss_of(model, p, support))(params)
            params = {name: p - LR * grads[name] for name, p in params.items()}
        return params

    def query_loss(params, support, query):
        return loss_of(model, adapted(params, support), query)

    if algorithm == "MAML":
        gradients = grad(lambda p: vmap(query_loss, in_dims=(None, 0, 0))(p, support, query).mean())(start)
        return list(gradients.values())
    ends = vmap(adapted, in_dims=(None, 0))(start, support)
    if algorithm == "Reptile":
        return [p - ends[name].mean(0) for name, p in start.items()]
    gradients = vmap(grad(lambda p, batch: loss_of(model, p, batch)))(ends, query)
    return [g.mean(0) for g in gradients.values()]


PEERS = {"plain loop": loop, "higher": higher, "TorchOpt": torchopt, "torch.func": func}
MODULES = {"higher": "higher", "TorchOpt": "torchopt"}
