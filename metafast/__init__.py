"""metafast: meta-learning of Transformers, fast, exact and small in memory."""

import importlib
from typing import Any

from metafast import inner
from metafast.accelerate import accelerate
from metafast.backend import BackendUnavailableError, build_info, use_backend
from metafast.check import Report, check
from metafast.meta import ANIL, IMAML, MAML, MAMLPlusPlus, MetaSGD, PerStep, ProtoMAML, ProtoNet, Reptile
from metafast.ops.attention import scaled_dot_product_attention
from metafast.ops.task_update import task_update

__version__ = "0.1.0"

__all__ = [
    "ANIL",
    "IMAML",
    "MAML",
    "BackendUnavailableError",
    "MAMLPlusPlus",
    "MetaSGD",
    "PerStep",
    "ProtoMAML",
    "ProtoNet",
    "Report",
    "Reptile",
    "accelerate",
    "build_info",
    "check",
    "inner",
    "scaled_dot_product_attention",
    "task_update",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Imported when they are asked for.
    if name in ("compat", "integrations", "models", "tasks"):
        return importlib.import_module(f"metafast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
