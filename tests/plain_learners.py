"""Every learner as a plain loop with every rule and option: what random learners are compared with."""

from __future__ import annotations

import copy

import torch
from plain_loop import at, task
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast
from metafast.inner import SGD, Adam


def rooted(x):
    """√x, whose derivative at 0 is 0."""
    return torch.where(x > 0, x.clamp(min=0).where(x > 0, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def clipped(rule, grads):
    if rule.clip_norm is not None:
        norm = rooted(torch.stack([g.square().sum() for g in grads]).sum())
        factor = (rule.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [g * factor for g in grads]
    if rule.clip_value is not None:
        grads = [g.clamp(-rule.clip_value, rule.clip_value) for g in grads]
    return grads


def updated(rule, p, g, state, step, lr, decay):
    """One parameter after a step of a rule, as the rule's docstring writes it; ``state`` is changed."""
    g = -g if rule.maximize else g
    if getattr(rule, "decoupled", False):
        p = p * (1 - lr * decay)
    else:
        g = g + decay * p
    if isinstance(rule, SGD):
        if rule.momentum == 0:
            return p - lr * g
        state["b"] = g if step == 0 else rule.momentum * state["b"] + (1 - rule.dampening) * g
        return p - lr * (g + rule.momentum * state["b"] if rule.nesterov else state["b"])
    if isinstance(rule, Adam):
        beta1, beta2 = rule.betas
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
        root = rooted(state["v"] / (1 - beta2 ** (step + 1)) + rule.eps_root)
        return p - lr * state["m"] / (1 - beta1 ** (step + 1)) / (root + rule.eps)
    state["v"] = rule.alpha * state.get("v", 0.0) + (1 - rule.alpha) * g * g
    average = 0.0
    if rule.centered:
        average = state["a"] = rule.alpha * state.get("a", 0.0) + (1 - rule.alpha) * g
    direction = g / (rooted(state["v"] - average * average) + rule.eps)
    state["b"] = rule.momentum * state.get("b", 0.0) + direction
    return p - lr * state["b"]


class PlainLearner:
    """A copy of a learner, computed one task after another.

    Within a chunk of tasks a step of all is taken before the next, since models update buffers in that order.
    """

    def __init__(self, meta):
        self.meta = copy.deepcopy(meta)
        self.model = self.meta.model
        self.adapted = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and name in meta.split_parameters().adapted
        ]
        self.headed = isinstance(meta, metafast.ProtoMAML)

    def output(self, params, x):
        own = {name: p for name, p in params.items() if not name.startswith("$")}
        out = functional_call(self.model, own, (x,), tie_weights=True)
        return out @ params["$weight"].T + params["$bias"] if "$weight" in params else out

    def loss(self, params, batch):
        return self.meta.loss_fn(lambda x: self.output(params, x), batch)

    def prototypes(self, params, batch):
        x, labels = batch
        out = self.output(params, x)
        return torch.stack(
            [out[labels == k].mean(0) if (labels == k).any() else out[0] * 0 for k in range(self.meta.ways)]
        )

    def parts(self, batch):
        examples = batch[0].shape[0]
        cuts = [x.tensor_split(min(self.meta.micro_batches, examples)) for x in batch]
        return [(part[0].shape[0] / examples, part) for part in zip(*cuts, strict=True)]

    def rate(self, name, step, of):
        value = self.meta.rates(step).get(name, getattr(self.meta.inner, name))
        return (
            value[of.lstrip("$") if of.startswith("$") else ("body." + of if self.headed else of)]
            if isinstance(value, dict)
            else value
        )

    def start(self, support):
        params = dict(self.model.named_parameters())
        tasks = [dict(params) for _ in range(len(support[0][0]))]
        if self.headed:
            for index, own in enumerate(tasks):
                c = self.prototypes(params, task(support[0], index))
                own["$weight"], own["$bias"] = 2 * c, -c.square().sum(-1)
                # The inner gradient by the embedding is that of a head that is given, not of where it comes from.
                own |= {name: p.view_as(p) for name, p in params.items()}
        return tasks

    def stepped(self, tasks, states, support, step, order):
        names = [name for name in tasks[0] if name.startswith("$") or name in self.adapted]
        grads = [[0.0] * len(names) for _ in tasks]
        cut = [self.parts(task(support, index)) for index in range(len(tasks))]
        for part in range(len(cut[0])):
            for index, own in enumerate(tasks):
                share, batch = cut[index][part]
                found = torch.autograd.grad(
                    self.loss(own, batch),
                    [own[name] for name in names],
                    create_graph=order == 2,
                    materialize_grads=True,
                )
                grads[index] = [g + share * f for g, f in zip(grads[index], found, strict=True)]
        for index, own in enumerate(tasks):
            for name, g in zip(names, clipped(self.meta.inner, grads[index]), strict=True):
                lr, decay = self.rate("lr", step, name), self.rate("weight_decay", step, name)
                state = states[index].setdefault(name, {})
                own[name] = updated(self.meta.inner, own[name], g, state, step, lr, decay)

    def adapt(self, support, steps):
        """Every task's parameters, without a graph."""
        tasks, states = self.start(support), [{} for _ in range(len(support[0][0]))]
        for step in range(steps):
            self.stepped(tasks, states, support[step], step, 1)
        return [{name: p.detach() for name, p in own.items()} for own in tasks]

    def chunk(self, support, query):
        """The losses whose sum is differentiated, and for Reptile the adapted parameters."""
        meta = self.meta
        if isinstance(meta, metafast.ProtoNet):
            params = dict(self.model.named_parameters())
            found = []
            everyone = [self.prototypes(params, task(support[0], index)) for index in range(len(support[0][0]))]
            for index, c in enumerate(everyone):
                batch = task(query, index)
                present = torch.stack([(support[0][1][index] == k).any() for k in range(meta.ways)])

                def logits(x, c=c, present=present):
                    distances = (self.output(params, x).unsqueeze(-2) - c).square().sum(-1)
                    return (-distances).masked_fill(~present, -torch.inf)

                found.append(meta.loss_fn(logits, batch))
            return torch.stack(found), None
        order = 2 if meta.order == 2 else 1
        tasks, states = self.start(support), [{} for _ in range(len(support[0][0]))]
        total = 0.0
        weights = getattr(meta, "step_weights", None) or [0.0] * (meta.steps - 1) + [1.0]
        for step in range(meta.steps):
            self.stepped(tasks, states, support[step], step, order)
            if weights[step] != 0 or step == meta.steps - 1:
                losses = torch.stack([self.loss(own, task(query, index)) for index, own in enumerate(tasks)])
                total = total + weights[step] * losses
        return total, tasks

    def __call__(self, support, query, task_weights):
        """The loss, the gradients of all parameters of the learner by name, and the buffers afterwards."""
        meta = self.meta
        tasks = len(query[0])
        size = meta.tasks_per_chunk if isinstance(meta.tasks_per_chunk, int) else tasks
        weights = torch.ones(tasks, dtype=torch.float64) if task_weights is None else task_weights
        params = {name: p for name, p in meta.named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(p) for name, p in params.items()}
        total = torch.zeros((), dtype=torch.float64)
        divisor = weights.sum() if meta.reduction == "mean" else 1.0
        for first in range(0, tasks, size):
            part = slice(first, first + size)
            with sdpa_kernel(SDPBackend.MATH):
                losses, adapted = self.chunk([[x[part] for x in step] for step in support], [x[part] for x in query])
                loss = (losses * weights[part]).sum() / divisor
                total = total + loss.detach()
                if isinstance(meta, metafast.Reptile):
                    for w, own in zip(weights[part], adapted, strict=True):
                        for name in self.adapted:
                            change = params["model." + name].detach() - own[name].detach()
                            gradients["model." + name] += w / divisor * change
                else:
                    found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
                    for gradient, part_gradient in zip(gradients.values(), found, strict=True):
                        gradient += part_gradient
        return total, gradients, {name: b.clone() for name, b in self.model.named_buffers()}


__all__ = ["PlainLearner", "at"]
