"""The compiled extension: importing it registers the kernels with torch's dispatcher."""  # noqa: N999

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    abi_target: str
    cpu_capability: str
    cuda_architectures: str | None

def build_info() -> BuildInfo:
    """Compiler, flags, ABI target, CUDA architectures (None: built without) and what the kernels use on this machine."""
