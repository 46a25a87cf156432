"""Gradient-based meta-learning of learn2learn (Arnold et al., arXiv 2008.12284, release 0.2.0) over this library's ops.

Attention inside a wrapped model is this library's, which can be differentiated twice, and updates of all parameters are
one call. Arguments, defaults and behaviour are learn2learn's.
"""

from typing import Any

from metafast.compat.learn2learn import algorithms, utils
from metafast.compat.learn2learn.utils import clone_module, detach_module, update_module

__all__ = ["algorithms", "clone_module", "detach_module", "update_module", "utils"]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{__name__} has {', '.join(__all__)}, and no {name!r}: take that from learn2learn itself")
