"""Builds ``metafast._C``. Everything that does not depend on the machine is in pyproject.toml.

``METAFAST_BUILD=auto|cpu|cuda``: ``auto`` builds the CUDA half when torch is a CUDA build and a toolkit is found
(never by whether a GPU is visible, so that images can be built on machines without one); ``cpu`` and ``cuda`` insist.
``METAFAST_SANITIZE=1`` adds AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``).
"""

import os
from pathlib import Path

from setuptools import setup
from torch import version as torch_version
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# The oldest torch whose stable ABI the extension asks for: one build serves this release and later ones.
TORCH_TARGET = "0x020b000000000000"
# What `pip install` for a CUDA torch builds for when TORCH_CUDA_ARCH_LIST does not say.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def builds_cuda() -> bool:
    choice = os.environ.get("METAFAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda"):
        raise ValueError(f"METAFAST_BUILD: expected auto, cpu or cuda, got {choice!r}")
    missing = [
        reason
        for absent, reason in [
            (torch_version.cuda is None, "torch is a CPU build"),
            (CUDA_HOME is None, "no CUDA toolkit (CUDA_HOME, nvcc)"),
        ]
        if absent
    ]
    if choice == "cuda" and missing:
        raise RuntimeError("METAFAST_BUILD=cuda, but " + " and ".join(missing))
    return choice != "cpu" and not missing


def extension(cuda: bool) -> CppExtension:
    root = Path(__file__).parent
    sources = [root / "csrc/library.cpp", *sorted((root / "csrc/cpu").rglob("*.cpp"))]
    flags = [
        "-O3",
        "-g0",  # Python asks for debug information, which takes a quarter of the time and nine tenths of the file
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    link = []
    if os.environ.get("METAFAST_SANITIZE", "0") == "1":
        link = ["-fsanitize=address,undefined"]
        flags += [*link, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]
    definitions = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("METAFAST_FLAGS", '"' + " ".join(flags) + '"')]
    arguments = {"cxx": flags}
    if cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += sorted((root / "csrc/cuda").glob("*.cu"))
        definitions += [("USE_CUDA", None), ("METAFAST_CUDA_ARCHITECTURES", f'"{architectures}"')]
        arguments["nvcc"] = ["-O3"]
    kind = CUDAExtension if cuda else CppExtension
    return kind(
        "metafast._C",
        [str(source.relative_to(root)) for source in sources],
        include_dirs=[str(root / "csrc")],
        define_macros=definitions,
        extra_compile_args=arguments,
        extra_link_args=link,
        # All of csrc, so that a source distribution made on a machine without CUDA has the CUDA half too.
        depends=sorted(str(file.relative_to(root)) for file in (root / "csrc").rglob("*.*") if file.suffix != ".pyc"),
    )


setup(ext_modules=[extension(builds_cuda())], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
