"""Meta-learning algorithms over one differentiable inner loop."""

from metafast.meta.maml import MAML
from metafast.meta.reptile import Reptile

__all__ = ["MAML", "Reptile"]
