"""``torch.nn.functional.linear`` for tasks side by side: a matrix product a task, however the rows of its input lie.

Under ``vmap`` over weights, torch multiplies every leading index of the input by a copy of the task's matrix and adds the
bias afterwards. A task's rows all meet the same matrix, so they are one matrix, and the bias rides on the product.
"""

from metafast.ops.linear.autograd import linear

__all__ = ["linear"]
