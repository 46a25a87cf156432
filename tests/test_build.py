"""What a build says about itself."""

from __future__ import annotations

import ast
from pathlib import Path

import metafast
from metafast.backend import extension

ROOT = Path(__file__).parent.parent


def test_build_info_says_how_the_extension_was_built() -> None:
    found = metafast.build_info()["extension"]
    assert found["compiler"].split()[0] in ("gcc", "clang")
    assert "-O3" in found["flags"]
    assert found["abi_target"] == "0x020b000000000000"  # torch 2.11
    assert found["cuda_architectures"] is None or "9.0" in found["cuda_architectures"]


def test_stub_names_what_the_extension_has() -> None:
    tree = ast.parse((ROOT / "metafast/_C.pyi").read_text())
    info = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    keys = {
        node.target.id for node in info.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    compiled = extension()
    assert compiled is not None
    assert keys == set(compiled.build_info())
    assert functions == {name for name in vars(compiled) if not name.startswith("_")}
