"""What every test shares: fresh random numbers, and where the tests that need a GPU or a compiled extension run."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from metafast.backend import extension_problem

if not torch.cuda.is_available():
    # Triton decides whether to interpret its kernels when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Their tests take half a minute each, which one of two processes would do alone at the end.
LONGEST = ("test_cuda_compile.py", "test_examples.py", "test_meta_fsdp.py", "test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> None:
    """Objects of packages and of tests before are not looked through again by the collector, nor by who asks it for all."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Other numbers at each run; a failure prints the seed, METAFAST_TEST_SEED repeats it."""
    seed = int(os.environ.get("METAFAST_TEST_SEED", int.from_bytes(os.urandom(4))))
    request.node.user_properties.append(("seed", seed))
    print(f"METAFAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def fused_cpu() -> None:
    """For tests of the compiled path: where the extension is not built they cannot run, and say why."""
    problem = extension_problem()
    if problem is not None:
        pytest.fail(f"the compiled extension does not load: {problem}")
