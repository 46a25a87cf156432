"""Batch, instance and group norm where forward mode is taken, against reverse over reverse mode in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import metafast
from metafast.testing import relative_error

NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "batch without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False, eps=0.1),
    "batch alone": lambda: nn.BatchNorm1d(6, affine=False),
    "batch of cumulative averages": lambda: nn.BatchNorm1d(6, momentum=None),
    "batch in evaluation": lambda: nn.BatchNorm1d(6).eval(),
    "instance": lambda: nn.InstanceNorm1d(6),
    "instance with weights": lambda: nn.InstanceNorm1d(6, affine=True),
    "instance with statistics": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "instance in evaluation": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True).eval(),
    "group": lambda: nn.GroupNorm(3, 6),
    "group alone": lambda: nn.GroupNorm(2, 6, affine=False),
    "layer": lambda: nn.LayerNorm(5),
    "layer without bias": lambda: nn.LayerNorm(5, bias=False),
    "layer alone": lambda: nn.LayerNorm((6, 5), elementwise_affine=False),
    "root mean square": lambda: nn.RMSNorm(5),
    "root mean square alone": lambda: nn.RMSNorm((6, 5), eps=0.1, elementwise_affine=False),
}
# Running statistics that are updated cannot be under vmap, in torch either.
UPDATING = ("batch", "batch alone", "batch of cumulative averages", "instance with statistics")


def products(model):
    """Ways to the Hessian of a loss times a direction: of x ``[2, 4, 6, 5]`` and parameters alike for both tasks."""

    def loss(params, x):
        return (functional_call(model, params, (x,)) * 1.3).sin().pow(2).sum()

    def both(params, x):
        return loss(params, x[0]) + loss(params, x[1])

    def tasks(params, x, in_dims=(None, 0)):
        return vmap(loss, in_dims)(params, x).sum()

    def dual(function):
        def product(params, x, t, s):
            with forward_ad.dual_level():
                params = {n: forward_ad.make_dual(p.detach().requires_grad_(), t[n]) for n, p in params.items()}
                x = forward_ad.make_dual(x.detach().requires_grad_(), s)
                grads = torch.autograd.grad(function(params, x), [*params.values(), x])
                return [forward_ad.unpack_dual(g).tangent for g in grads]

        return product

    def forward_over_reverse(function):
        def product(params, x, t, s):
            by_params, by_x = jvp(grad(function, (0, 1)), (params, x), (t, s))[1]
            return [*by_params.values(), by_x]

        return product

    def reverse_over_forward(function):
        def product(params, x, t, s):
            by_params, by_x = grad(lambda *at: jvp(function, at, (t, s))[1], (0, 1))(params, x)
            return [*by_params.values(), by_x]

        return product

    def inside(params, x, t, s):
        by_params, by_x = jvp(lambda p, x: vmap(grad(loss, (0, 1)), (None, 0))(p, x), (params, x), (t, s))[1]
        return [*(p.sum(0) for p in by_params.values()), by_x]

    return {
        "reverse over reverse": (
            lambda params, x, t, s: torch.autograd.grad(
                sum((a * b).sum() for a, b in zip(first(both, params, x), [*t.values(), s], strict=True)),
                [*params.values(), x],
            )
        ),
        "jvp(grad)": forward_over_reverse(both),
        "jvp(grad(vmap))": forward_over_reverse(tasks),
        "jvp(vmap(grad))": inside,
        "grad(jvp)": reverse_over_forward(both),
        "grad(jvp(vmap))": reverse_over_forward(tasks),
        "dual level": dual(both),
        "dual level over vmap": dual(tasks),
    }


def first(function, params, x):
    return torch.autograd.grad(function(params, x), [*params.values(), x], create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", list(products(None))[1:])
@pytest.mark.parametrize("name", NORMS)
def test_hessians_by_forward_mode(name, way, backend, generator):
    if "vmap" in way and name in UPDATING:
        pytest.skip("torch updates no statistics under vmap")
    model = NORMS[name]().double()
    if "jvp" in way and hasattr(model, "num_batches_tracked"):
        # Which torch does not count under its transforms.
        model.num_batches_tracked = None
    x, s = (torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in "xs")
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator)
    params = dict(model.named_parameters())
    t = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}
    other = copy.deepcopy(model)
    expected = products(other)["reverse over reverse"](params, x, t, s)
    with metafast.accelerate(model), metafast.use_backend(backend):
        found = products(model)[way](params, x, t, s.detach())
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-9
    for (key, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert relative_error(a, b) < 1e-12, key


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.batch_norm(x, None, None, x[0, :5, 0], training=True),
        lambda x: F.instance_norm(x, weight=x[0, :5, 0]),
        lambda x: F.group_norm(x, 4),
        lambda x: F.group_norm(x, 3, x[0, :5, 0]),
    ],
)
def test_shapes_that_do_not_fit_are_torchs_errors(call, generator):
    x = torch.randn(4, 6, 5, generator=generator)
    with metafast.accelerate(nn.Identity()), pytest.raises(RuntimeError):
        jvp(call, (x,), (x,))
