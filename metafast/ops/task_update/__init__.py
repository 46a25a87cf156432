"""The update of all parameters of all tasks in one call, differentiable."""

from metafast.ops.task_update.api import task_update
from metafast.ops.task_update.outer import moving_average, reptile_update, task_mean

__all__ = ["moving_average", "reptile_update", "task_mean", "task_update"]
