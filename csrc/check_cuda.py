"""Compiles every CUDA file of csrc/cuda with nvcc, warnings as errors, and throws the objects away.

A machine without a GPU, beside a CPU build of torch, can do this: the files use torch's stable ABI alone, whose headers
need no CUDA half of torch.

    python csrc/check_cuda.py
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

ROOT = Path(__file__).parent
ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    if CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return str(Path(CUDA_HOME) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile_object(nvcc: str, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            nvcc,
            *("-c", str(source), "-o", str(out / f"{source.stem}.o")),
            *("-O1", "-std=c++20", "--threads", "0", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall"),
            # The host's compiler warns of more when it optimizes; the device's need not.
            *("-Xcicc", "-O0", "-Xptxas", "-O0"),
            *COMMON_NVCC_FLAGS,
            # No file asks for the architecture: one front end serves them all.
            f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{','.join(f'sm_{n}' for n in ARCHITECTURES)}]",
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            *(argument for path in include_paths() for argument in ("-isystem", path)),
            *("-I", str(ROOT)),
        ],
        capture_output=True,
        text=True,
    )


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc found: nothing was compiled", file=sys.stderr)
        return 2
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda source: compile_object(nvcc, source, Path(out)), sources))
    for source, result in zip(sources, results, strict=True):
        print(f"{source.name}: {'compiles' if result.returncode == 0 else 'does not compile'}")
        print(result.stdout + result.stderr, end="")
    return int(any(result.returncode != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())
