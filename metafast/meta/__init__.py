"""Meta-learning algorithms over one differentiable inner loop."""

from metafast.meta.anil import ANIL
from metafast.meta.imaml import IMAML
from metafast.meta.maml import MAML
from metafast.meta.maml_plus_plus import MAMLPlusPlus
from metafast.meta.meta_sgd import MetaSGD
from metafast.meta.proto_maml import ProtoMAML
from metafast.meta.proto_net import ProtoNet
from metafast.meta.reptile import Reptile
from metafast.meta.tasks import PerStep

__all__ = ["ANIL", "IMAML", "MAML", "MAMLPlusPlus", "MetaSGD", "PerStep", "ProtoMAML", "ProtoNet", "Reptile"]
