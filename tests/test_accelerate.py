"""Swapping attention into models that are not ours, and putting everything back."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_early
from torch.utils.checkpoint import checkpoint

import metafast
from metafast.testing import relative_error

pytestmark = pytest.mark.usefixtures("fused_cpu")
# In a tuple: a plain name in this module, which defines models, would be replaced like any other.
TORCHS = (F.scaled_dot_product_attention,)


class Early(nn.Module):
    """Calls attention by a name imported before anybody could replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return imported_early(*self.qkv(x).unsqueeze(1).chunk(3, -1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Early()

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False)


class ByModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1), is_causal=True)


def encoder(norm_first=True):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def padding():
    return torch.arange(6) >= torch.tensor([[6], [4], [3]])


def causal():
    return nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)


def attention_module():
    return nn.MultiheadAttention(8, 2, batch_first=True).double()


# A model and how it is called on x [3, 6, 8].
CALLS = {
    "encoder": (encoder, lambda m, x: m(x)),
    "encoder, post-norm, padding": (
        lambda: encoder(norm_first=False),
        lambda m, x: m(x, src_key_padding_mask=padding()),
    ),
    "encoder, causal": (encoder, lambda m, x: m(x, mask=causal(), is_causal=True)),
    "encoder, causal, padding": (
        encoder,
        lambda m, x: m(x, mask=causal() == -torch.inf, src_key_padding_mask=padding(), is_causal=True),
    ),
    "encoder-decoder, causal, padding": (
        lambda: nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True).double(),
        lambda m, x: m(
            x,
            x.flip(1),
            tgt_mask=causal() == -torch.inf,
            src_key_padding_mask=padding(),
            memory_key_padding_mask=padding(),
            tgt_is_causal=True,
        ),
    ),
    "attention": (attention_module, lambda m, x: m(x, x, x, need_weights=False)[0]),
    "attention, padding": (attention_module, lambda m, x: m(x, x, x, padding(), need_weights=False)[0]),
    "attention, causal": (
        attention_module,
        lambda m, x: m(x, x, x, need_weights=False, attn_mask=causal(), is_causal=True)[0],
    ),
    "imported early": (lambda: Early().double(), lambda m, x: m(x)),
    "by module": (lambda: ByModule().double(), lambda m, x: m(x)),
}


def second_order(model, call, x):
    """Outputs, first and second derivatives by every parameter."""
    params = list(model.parameters())
    out = call(model, x)
    first = torch.autograd.grad(out.pow(2).sum(), params, create_graph=True)
    return out, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), params)


@pytest.mark.parametrize("name", CALLS)
def test_unmodified_models_to_second_order(name: str, generator: torch.Generator) -> None:
    make, call = CALLS[name]
    model, x = make(), torch.randn(3, 6, 8, generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_order(model, call, x)
    with metafast.accelerate(model), metafast.use_backend("fused"):
        found = second_order(model, call, x)
    for a, b in zip(found, expected, strict=True):
        # A gradient that vanishes (that of a key's bias does) is compared with the size of the others.
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-12
    assert F.scaled_dot_product_attention is TORCHS[0]


def test_what_torch_raises_without(generator: torch.Generator) -> None:
    model, x = ByModule(), torch.randn(3, 6, 8, generator=generator)
    with pytest.raises(RuntimeError, match="is not implemented"):
        second_order(model, lambda m, x: m(x), x)


def test_under_vmap_of_grad(generator: torch.Generator) -> None:
    model, x = encoder(), torch.randn(4, 3, 6, 8, generator=generator, dtype=torch.float64)
    params = dict(model.named_parameters())

    def gradient(x):
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).pow(2).sum())(params)

    with metafast.accelerate(model), metafast.use_backend("fused"):
        found = torch.func.vmap(gradient)(x)
    for t in range(4):
        with sdpa_kernel(SDPBackend.MATH):
            expected = gradient(x[t])
        for key, value in expected.items():
            assert relative_error(found[key][t], value) < 1e-10 or (found[key][t] - value).abs().max() < 1e-12


def test_everything_is_restored_after_an_exception() -> None:
    module = sys.modules[Early.__module__]
    with pytest.raises(KeyError), metafast.accelerate(Early()):
        assert F.scaled_dot_product_attention is not TORCHS[0]
        assert module.imported_early is not TORCHS[0]
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS[0]
    assert torch._C._nn.scaled_dot_product_attention is TORCHS[0]
    assert module.imported_early is TORCHS[0]


def accelerated(model) -> bool:
    """Whether a call of the model goes to metafast's attention."""
    # Its graph lives as long as the output does.
    output = model(torch.ones(1, 2, 8))
    graph, names = [output.grad_fn], set()
    while graph:
        node = graph.pop()
        if node is not None:
            names.add(node.name())
            graph += [parent for parent, _ in node.next_functions]
    assert any("Attention" in name or "ScaledDotProduct" in name for name in names)
    return "AttentionBackward" in names


def test_handle_serves_its_model_alone_until_removed() -> None:
    model, other = Early(), ByModule()
    handle = metafast.accelerate(model)
    assert accelerated(model)
    assert not accelerated(other)
    again = metafast.accelerate(model)
    again.remove()
    assert accelerated(model)
    handle.remove()
    handle.remove()
    assert not accelerated(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert F.scaled_dot_product_attention is TORCHS[0]


def test_handle_after_an_exception_in_the_model() -> None:
    model, other = Early(), ByModule()
    handle = metafast.accelerate(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 2, 3))
    assert not accelerated(other)
    handle.remove()


def test_nested_contexts() -> None:
    model, other = Early(), ByModule()
    with metafast.accelerate(model):
        with metafast.accelerate(other):
            assert accelerated(other)
        assert accelerated(model)
        assert accelerated(other)
    assert not accelerated(model)


def test_context_stays_in_its_thread_and_handle_does_not() -> None:
    model, seen = Early(), []

    def look():
        seen.append(accelerated(model))

    with metafast.accelerate(model) as handle:
        handle.remove()  # what hooks give to other threads is taken away: this thread keeps the context
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    handle = metafast.accelerate(model)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    handle.remove()
    assert seen == [False, True]


def test_activation_checkpointing_computes_again_what_it_computed(generator: torch.Generator) -> None:
    model, x = Checkpointed().double(), torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_order(model.inside, lambda m, x: m(x), x)
    handle = metafast.accelerate(model)
    found = second_order(model, lambda m, x: m(x), x)
    handle.remove()
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-12


def test_names_in_modules_made_by_hand() -> None:
    """A name imported early under another name, in a module that only the model's class points to."""
    source = types.ModuleType("made_by_hand")
    source.__dict__.update(nn=nn, attend=TORCHS[0])
    sys.modules["made_by_hand"] = source
    try:
        exec(
            "class Made(nn.Module):\n"
            "    def __init__(self):\n        super().__init__(); self.lin = nn.Linear(8, 8)\n"
            "    def forward(self, x):\n        y = self.lin(x).unsqueeze(1); return attend(y, y, y)\n",
            source.__dict__,
        )
        model = source.Made()
        with metafast.accelerate(model):
            assert accelerated(model)
        assert source.attend is TORCHS[0]
    finally:
        del sys.modules["made_by_hand"]


@pytest.mark.parametrize("as_keyword", [False, True])
def test_causal_biases_of_torch(as_keyword: bool) -> None:
    """Where the call is ours, and where another thread keeps torch's while the names are replaced."""
    query, key = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 8, 4)
    bias = causal_lower_right(5, 8)

    def attend(mask: torch.Tensor) -> torch.Tensor:
        if as_keyword:
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return F.scaled_dot_product_attention(query, key, key, mask)

    expected = attend(bias._materialize())
    with metafast.accelerate(nn.Identity()):
        out = attend(bias)
        assert torch.autograd.grad(out.sum(), query, create_graph=True)[0].requires_grad
        with ThreadPoolExecutor(1) as pool:
            torchs = pool.submit(attend, bias).result()
    for found in (out, torchs, attend(bias)):
        torch.testing.assert_close(found, expected)


def test_nested_tensors_keep_torchs_attention() -> None:
    model = ByModule()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors announce that they are a prototype
        x = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)], layout=torch.strided)
        with metafast.accelerate(model):
            out = F.scaled_dot_product_attention(x, x, x)
    assert out.is_nested


def test_bad_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        metafast.accelerate(accelerated)


def test_removed_handle_cannot_be_entered() -> None:
    handle = metafast.accelerate(Early())
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.__enter__()
