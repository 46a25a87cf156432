"""The update of all parameters of all tasks in one call, differentiable."""

from metafast.ops.task_update.api import task_update
from metafast.ops.task_update.autograd import only_derivatives

__all__ = ["only_derivatives", "task_update"]
