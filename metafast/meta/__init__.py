"""Meta-learning algorithms over one differentiable inner loop."""

from metafast.meta.anil import ANIL
from metafast.meta.maml import MAML
from metafast.meta.maml_plus_plus import MAMLPlusPlus
from metafast.meta.meta_sgd import MetaSGD
from metafast.meta.reptile import Reptile
from metafast.meta.tasks import PerStep

__all__ = ["ANIL", "MAML", "MAMLPlusPlus", "MetaSGD", "PerStep", "Reptile"]
