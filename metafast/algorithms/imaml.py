"""Implicit MAML."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from metafast.algorithms.learner import MetaLearner, Options
from metafast.engine.inner_loop import Losses, Start
from metafast.engine.precomputed_gradients import with_precomputed_gradients
from metafast.engine.step import TaskResults
from metafast.engine.task_batch import LossFn, Params, PerStep, check_count
from metafast.inner import Rule

SOLVERS = ("cg", "neumann")
Vector = list[Tensor]


class IMAML(MetaLearner):
    """iMAML (Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019, algorithms 1 and 2), all tasks side by side.

    The inner loop minimises G(φ) = L̂_i(φ) + λ/2 ‖φ − θ‖² (equation 3) with any rule and keeps no graph. At the minimum the
    meta-gradient is (I + ∇²L̂_i(φ_i) / λ)⁻¹ ∇L_i(φ_i) (lemma 1). A solver finds it with Hessian-vector products alone. The
    meta-gradient is as exact as the inner minimum and the solution are.

    Args:
        model, loss_fn, inner, steps, options: as for :class:`metafast.MetaLearner`. Parameters that are not
            adapted get their implicit gradient as well. Rates have no gradient: the minimum does not depend on them.
        proximal: λ, above 0.
        solver: ``"cg"``, conjugate gradient (section 3, algorithm 2), which needs I + ∇²L̂ / λ to be positive definite; or
            ``"neumann"``, the series Σ_j (−∇²L̂ / λ)^j, which needs λ above the Hessian's largest eigenvalue.
        solver_steps: number of Hessian-vector products that the solver takes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner: Rule,
        steps: int = 10,
        proximal: float = 1.0,
        solver: str = "cg",
        solver_steps: int = 5,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, loss_fn, inner=inner, steps=steps, order=1, **options)
        if inner.learn:
            raise ValueError(f"inner: iMAML has no gradient for rates; expected none in learn, got {inner.learned}")
        if isinstance(proximal, bool) or not isinstance(proximal, (int, float)):
            raise TypeError(f"proximal: expected a number, got {type(proximal).__name__}")
        if not proximal > 0:
            raise ValueError(f"proximal: expected a number above 0, got {proximal}")
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
        self.proximal = float(proximal)
        self.solver = solver
        self.solver_steps = check_count("solver_steps", solver_steps)

    def inner_losses(self, start: Start) -> Losses:
        """``loss_fn`` on the support set, and λ/2 ‖φ − θ‖²."""
        centre = {name: p.detach() for name, p in start.params.items()}
        return _Proximal(self.task_losses, centre, self.proximal)

    def task_results(self, support: Any, query: Any, tasks: int) -> TaskResults:
        """The query losses at the inner minimum, with the implicit gradient."""
        if isinstance(support, PerStep):
            raise TypeError("support: iMAML minimises one loss, expected one support set, got PerStep")
        start = self.start(support)
        with torch.no_grad():
            adapted = self.inner_loop(start, order=1).run(start, support, tasks, self.steps)
        if not torch.is_grad_enabled():
            losses, metrics = self.task_losses.compute(adapted.params, start.shared, query)
            return TaskResults(losses, adapted.losses, losses, metrics)

        at = {name: p.detach().requires_grad_() for name, p in adapted.params.items()}
        # Every task's own view of what they share, so that each task gets gradients of its own.
        shared = {name: p.detach().expand(tasks, *p.shape).requires_grad_() for name, p in start.shared.items()}
        losses, metrics = self.task_losses.compute({**at, **shared}, {}, query)
        direct = _grad(losses.sum(), [*at.values(), *shared.values()])
        b, direct_shared = direct[: len(at)], direct[len(at) :]

        support_losses, _ = self.task_losses.compute({**at, **shared}, {}, support)
        hessian = _Hessian(_grad(support_losses.sum(), list(at.values()), create_graph=True), list(at.values()))
        solve = _conjugate_gradient if self.solver == "cg" else _neumann
        solution = solve(hessian, b, self.proximal, self.solver_steps)
        # φ* depends on what the tasks share too: dφ*/ds = −(∇²L̂ + λI)⁻¹ ∂_s ∇L̂.
        through = hessian.vjp(solution, list(shared.values())) if shared else []
        implicit = [d - v / self.proximal for d, v in zip(direct_shared, through, strict=True)]
        params = [*start.params.values(), *start.shared.values()]
        values = with_precomputed_gradients(losses, [*solution, *implicit], params)
        return TaskResults(values, adapted.losses, losses, metrics)


class _Proximal:
    """Support losses plus λ/2 ‖φ − θ‖²."""

    def __init__(self, losses: Losses, centre: Params, strength: float) -> None:
        self.model = losses.model
        self._losses = losses
        self._centre = centre
        self._strength = strength

    def compute(self, own: Params, shared: Params, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = self._losses.compute(own, shared, batch)
        squares = [(own[name] - centre).square().flatten(1).sum(1) for name, centre in self._centre.items()]
        return losses + self._strength / 2 * torch.stack(squares).sum(0), metrics


class _Hessian(NamedTuple):
    """Products with ∇²L̂ of every task, from the gradients ``[T, *shape]`` with their graph, and where they were taken."""

    gradients: Vector
    at: Vector

    def product(self, vector: Vector) -> Vector:
        """∇²L̂ times ``vector``."""
        return self.vjp(vector, self.at)

    def vjp(self, vector: Vector, by: Vector) -> Vector:
        reached = [(g, v) for g, v in zip(self.gradients, vector, strict=True) if g.requires_grad]
        if not reached:
            return [torch.zeros_like(p) for p in by]
        found = torch.autograd.grad(
            [g for g, _ in reached], by, [v for _, v in reached], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(p) if f is None else f for f, p in zip(found, by, strict=True)]


def _conjugate_gradient(hessian: _Hessian, b: Vector, strength: float, steps: int) -> Vector:
    """(I + H/λ)⁻¹ b of every task at once, from x = 0: Hestenes and Stiefel, with a step size per task."""
    x = [torch.zeros_like(v) for v in b]
    residual, direction = list(b), list(b)
    square = _dot(residual, residual)
    for _ in range(steps):
        product = _added(direction, hessian.product(direction), 1 / strength)
        curvature = _dot(direction, product)
        # A task that is solved stays where it is.
        alpha = torch.where(square > 0, square / curvature, torch.zeros_like(square))
        x = _added(x, direction, alpha)
        residual = _added(residual, product, -alpha)
        before, square = square, _dot(residual, residual)
        beta = torch.where(before > 0, square / before, torch.zeros_like(square))
        direction = _added(residual, direction, beta)
    return x


def _neumann(hessian: _Hessian, b: Vector, strength: float, steps: int) -> Vector:
    """Σ_j (−H/λ)^j b, j from 0 to ``steps``."""
    x, term = list(b), list(b)
    for _ in range(steps):
        term = [-v / strength for v in hessian.product(term)]
        x = _added(x, term, 1.0)
    return x


def _dot(a: Vector, b: Vector) -> Tensor:
    """Every task's inner product over all parameters, ``[T]``."""
    return torch.stack([(u * v).flatten(1).sum(1) for u, v in zip(a, b, strict=True)]).sum(0)


def _added(a: Vector, b: Vector, factor: Tensor | float) -> Vector:
    """The sum a + factor · b, with one factor for all tasks or one per task."""
    if isinstance(factor, Tensor):
        return [u + factor.view(-1, *[1] * (v.ndim - 1)) * v for u, v in zip(a, b, strict=True)]
    return [u + factor * v for u, v in zip(a, b, strict=True)]


def _grad(value: Tensor, by: Vector, create_graph: bool = False) -> Vector:
    return list(torch.autograd.grad(value, by, create_graph=create_graph, allow_unused=True, materialize_grads=True))
