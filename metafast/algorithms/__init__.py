"""Meta-learning algorithms over one differentiable inner loop."""

from metafast.algorithms.anil import ANIL
from metafast.algorithms.imaml import IMAML
from metafast.algorithms.learner import MetaLearner
from metafast.algorithms.maml import MAML
from metafast.algorithms.maml_plus_plus import MAMLPlusPlus
from metafast.algorithms.meta_sgd import MetaSGD
from metafast.algorithms.proto_maml import ProtoMAML
from metafast.algorithms.proto_net import ProtoNet
from metafast.algorithms.reptile import Reptile

__all__ = ["ANIL", "IMAML", "MAML", "MAMLPlusPlus", "MetaLearner", "MetaSGD", "ProtoMAML", "ProtoNet", "Reptile"]
