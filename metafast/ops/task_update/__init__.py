"""The update of all parameters of all tasks in one call, differentiable."""

from metafast.ops.task_update.api import task_update

__all__ = ["task_update"]
