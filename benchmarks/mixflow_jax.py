"""The model of ``mixflow_model`` in JAX, and its meta-gradient in reverse over reverse mode and as MixFlow-MG takes it.

MixFlow-MG (Kemaev et al. 2025, arXiv:2505.00793) is three things, all of which are here: the product with the Hessian of an
inner step is forward over reverse, inner steps are rebuilt in the backward pass with their inner gradients kept, and layers
are rebuilt within a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.ad_checkpoint import checkpoint_name
from mixflow_model import BETAS, EPS, EPS_ROOT, LR, NORM_EPS, LanguageModel, Setting, rotations
from torch import Tensor

Params = dict[str, jax.Array]
Gradient = Callable[[Params, jax.Array], Params]
KEPT = "inner gradients"
STACKED = "layers."


class Way(NamedTuple):
    """How the meta-gradient is computed.

    Args:
        mixed: products with the Hessian forward over reverse; else what ``jax.grad`` of ``jax.grad`` gives.
        keep_gradients: inner gradients are kept, and not computed again where a step is rebuilt.
        rebuild_layers: only a layer's input is kept within a step.
    """

    mixed: bool
    keep_gradients: bool
    rebuild_layers: bool


WAYS = {
    "JAX, reverse over reverse": Way(mixed=False, keep_gradients=False, rebuild_layers=True),
    "JAX, MixFlow-MG": Way(mixed=True, keep_gradients=True, rebuild_layers=True),
    # Written out, not in a scan: faster where memory allows it.
    "JAX, MixFlow-MG, layers kept": Way(mixed=True, keep_gradients=True, rebuild_layers=False),
}


def arrays(model: LanguageModel) -> Params:
    """The weights of the torch model, copied; those of its layers as one stack."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    own = [name.removeprefix("layers.0.") for name in weights if name.startswith("layers.0.")]
    stacks = {STACKED + name: [weights[f"layers.{i}.{name}"] for i in range(len(model.layers))] for name in own}
    others = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
    return {name: jnp.array(weight) for name, weight in {**others, **stacks}.items()}


def array(text: Tensor) -> jax.Array:
    return jnp.array(text.numpy().astype(np.int32))


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS) * weight


def rotated(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], -1)


def layer(heads: int, tables: tuple[np.ndarray, np.ndarray], params: Params, x: jax.Array) -> jax.Array:
    n, length, width = x.shape
    qkv = normed(x, params["norm_attention.weight"]) @ params["qkv.weight"].T
    query, key, value = qkv.reshape(n, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    query, key = rotated(query, *tables), rotated(key, *tables)
    scores = query @ key.swapaxes(-1, -2) * (width // heads) ** -0.5
    scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -jnp.inf)
    attended = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(n, length, width)
    x = x + attended @ params["out.weight"].T
    hidden = jax.nn.gelu(normed(x, params["norm_network.weight"]) @ params["up.weight"].T)
    return x + hidden @ params["down.weight"].T


def loss_of(setting: Setting, rebuild_layers: bool) -> Callable[[Params, jax.Array], jax.Array]:
    """``loss(params, text)`` of the next token; ``text`` ``[n, length + 1]``."""
    tables = tuple(table.numpy() for table in rotations(setting.length, setting.width // setting.heads))
    one = functools.partial(layer, setting.heads, tables)
    if rebuild_layers:
        # In a scan: written out, XLA on the CPU merges what is computed again with what was computed before, and keeps it.
        one = jax.checkpoint(one, prevent_cse=False)

    def loss(params: Params, text: jax.Array) -> jax.Array:
        x = params["tokens.weight"][text[:, :-1]]
        stacks = {name.removeprefix(STACKED): p for name, p in params.items() if name.startswith(STACKED)}
        if rebuild_layers:
            x, _ = jax.lax.scan(lambda x, own: (one(own, x), None), x, stacks)
        else:
            for number in range(setting.layers):
                x = one({name: stack[number] for name, stack in stacks.items()}, x)
        logits = normed(x, params["norm.weight"]) @ params["tokens.weight"].T
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], -1)
        return -chosen.mean()

    return loss


def forward_over_reverse(loss: Callable[[Params, jax.Array], jax.Array]) -> Gradient:
    """The gradient by the parameters, whose vector-Jacobian product is taken forward: the Hessian is symmetric."""

    @jax.custom_vjp
    def gradient(params: Params, text: jax.Array) -> Params:
        return jax.grad(loss)(params, text)

    def forward(params: Params, text: jax.Array) -> tuple[Params, Any]:
        return gradient(params, text), (params, text)

    def backward(kept: Any, cotangent: Params) -> tuple[Params, None]:
        params, text = kept
        _, product = jax.jvp(lambda params: jax.grad(loss)(params, text), (params,), (cotangent,))
        return product, None

    gradient.defvjp(forward, backward)
    return gradient


def adam(
    params: Params, grads: Params, first: Params, second: Params, corrections: jax.Array
) -> tuple[Params, Params, Params]:
    one, two = BETAS
    first = jax.tree.map(lambda m, g: one * m + (1 - one) * g, first, grads)
    second = jax.tree.map(lambda v, g: two * v + (1 - two) * g * g, second, grads)
    params = jax.tree.map(
        lambda p, m, v: p - LR * m * corrections[0] / (jnp.sqrt(v * corrections[1] + EPS_ROOT) + EPS),
        params,
        first,
        second,
    )
    return params, first, second


def meta_gradient(setting: Setting, way: Way) -> Callable[..., tuple[jax.Array, Params]]:
    """``call(params, support, query)``: the outer loss and its gradient by the parameters before the inner loop."""
    loss = loss_of(setting, way.rebuild_layers)
    gradient = forward_over_reverse(loss) if way.mixed else jax.grad(loss)

    def step(carry: tuple[Params, Params, Params], batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        text, corrections = batch
        params, first, second = carry
        grads = checkpoint_name(gradient(params, text), KEPT)
        return adam(params, grads, first, second, corrections), None

    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if way.keep_gradients else None
    # Inside of a scan nothing can be merged with what the forward computed.
    step = jax.checkpoint(step, policy=policy, prevent_cse=False)

    # In float64, since 1 - 0.999 is not 0.001 in float32.
    counts = np.arange(1, setting.steps + 1)[:, None]
    corrections = (1 / (1 - np.array(BETAS) ** counts)).astype(np.float32)

    def outer(params: Params, support: jax.Array, query: jax.Array) -> jax.Array:
        zeros = jax.tree.map(jnp.zeros_like, params)
        (params, _, _), _ = jax.lax.scan(step, (params, zeros, zeros), (support, corrections))
        return loss(params, query)

    return jax.value_and_grad(outer)


def as_tensors(grads: Params, model: LanguageModel) -> list[Tensor]:
    """``grads`` in the order of the parameters of ``model``, in the memory where they are."""
    found = {name: torch.from_dlpack(grad) for name, grad in grads.items()}
    order = []
    for name, _ in model.named_parameters():
        if name in found:
            order.append(found[name])
        else:
            _, number, own = name.split(".", 2)
            order.append(found[STACKED + own][int(number)])
    return order
