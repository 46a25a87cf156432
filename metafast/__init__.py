"""Meta-learning of Transformers: meta-gradients that are exact to second order, all tasks side by side."""

import importlib
from typing import Any

from metafast import inner
from metafast.acceleration import accelerate
from metafast.algorithms import ANIL, IMAML, MAML, MAMLPlusPlus, MetaLearner, MetaSGD, ProtoMAML, ProtoNet, Reptile
from metafast.backend import BackendUnavailableError, build_info, use_backend
from metafast.checking import Report, check
from metafast.engine.inner_loop import InnerLoop, Start
from metafast.engine.learners import Learners
from metafast.engine.step import Outcome, TaskResults
from metafast.engine.task_batch import PerStep
from metafast.ops.attention import scaled_dot_product_attention
from metafast.ops.task_update import task_update
from metafast.version import __version__

__all__ = [
    "ANIL",
    "IMAML",
    "MAML",
    "BackendUnavailableError",
    "InnerLoop",
    "Learners",
    "MAMLPlusPlus",
    "MetaLearner",
    "MetaSGD",
    "Outcome",
    "PerStep",
    "ProtoMAML",
    "ProtoNet",
    "Report",
    "Reptile",
    "Start",
    "TaskResults",
    "__version__",
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
    if name in ("compat", "integrations", "models", "tasks", "training"):
        return importlib.import_module(f"metafast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
