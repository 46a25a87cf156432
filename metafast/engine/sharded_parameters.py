"""Parameters that ``torch.distributed.fsdp.fully_shard`` has sharded, whole while a call needs them.

FSDP gathers a module's parameters before its forward and frees them after it, by hooks of the module and of its outputs. An
inner gradient that is differentiated again passes no hook on its way, and ``vmap`` calls none. So for the time of a call,
FSDP's hooks are off, and ordinary parameters without memory stand in the places of the sharded ones. An operation that reads
one, in a forward, a backward or a double backward, has its module's parameters gathered first; those of the module before
are freed. What autograd keeps are the same tensors, so that the graph holds no gathered copy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.computed_once import anew

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded the model or parts of it.

    Raises:
        ValueError: it is distributed in a way that a learner cannot compute with.
    """
    # Nobody has sharded a model without having imported these.
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "model: expected parameters of its own, got FullyShardedDataParallel, which puts flat ones in their "
                "places; use torch.distributed.fsdp.fully_shard"
            )
    return any(isinstance(module, FSDPModule) for module in model.modules())


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Raises ValueError where a model is sharded that would have to be copied."""
    if is_sharded(model):
        raise ValueError(f"{what}: expected a model that can be copied, which fully_shard's cannot; {instead}")


class Whole:
    """A model with ordinary parameters in the places of sharded ones, for a while.

    Args:
        model: its modules that ``fully_shard`` was called with are the units that are gathered and freed.

    Raises:
        ValueError: the sharding is none that can be computed with; the message says why.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._model = model
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            _check_policy(module)
            # A forward outside of a call leaves the outermost one gathered.
            module.reshard()
        # A module's own unit is the innermost one around it.
        names = {id(p): name for name, p in model.named_parameters()}
        self._units: list[_Unit] = []
        seen: set[int] = set()
        for module in reversed(modules):
            shards: list[Any] = [p for p in module.parameters() if id(p) not in seen and _is_distributed(p)]
            seen.update(map(id, shards))
            for shard in shards:
                _check(names[id(shard)], shard)
            if shards:
                self._units.append(_Unit(shards, [names[id(shard)] for shard in shards], _stays_gathered(module)))
        for name, p in model.named_parameters():
            if _is_distributed(p) and id(p) not in seen:
                raise ValueError(
                    f"{name}: expected a parameter that fully_shard has sharded, with the model or a part of it, got a "
                    "DTensor of something else, which tasks cannot compute with"
                )
        self._hooks = [hooks for module in modules for hooks in _hooks(module)]
        self._stand_ins = {
            id(shard): whole for unit in self._units for shard, whole in zip(unit.shards, unit.wholes, strict=True)
        }
        self._shards: dict[int, Tensor] = {
            id(whole): shard for unit in self._units for shard, whole in zip(unit.shards, unit.wholes, strict=True)
        }
        self._gathering = _Gathering(self._units)

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Ordinary parameters are in the model, and FSDP's hooks are off."""
        places = [
            (module._parameters, key, p)
            for module in self._model.modules()
            for key, p in module._parameters.items()
            if id(p) in self._stand_ins
        ]
        before = [(hooks, hooks.copy()) for hooks, _ in self._hooks]
        try:
            for members, key, p in places:
                members[key] = self._stand_ins[id(p)]
            for hooks, number in self._hooks:
                del hooks[number]
            yield
        finally:
            for members, key, p in places:
                members[key] = p
            for hooks, kept in before:
                # In the order of before, with hooks that the block has added or removed.
                now = {number: hook for number, hook in hooks.items() if number not in kept}
                hooks.clear()
                hooks.update({**kept, **now})

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, operations find the parameters that they read."""
        try:
            with self._gathering:
                yield
        finally:
            for unit in self._units:
                unit.free()

    def own(self, results: Result) -> Result:
        """Results with copies of tensors that share the memory of parameters; inside of :meth:`gathered`."""

        def copied(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) and self._gathering.unit(leaf) is not None else leaf

        copies: Result = pytree.tree_map(copied, results)
        return copies

    def sharded(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The sharded parameters in whose places these are; others as they are."""
        return [self._shards.get(id(p), p) for p in params]


class _Unit:
    """Sharded parameters that are gathered and freed together.

    Args:
        shards: the parameters of a rank.
        names: their names in the model.
        stays: whether they stay gathered once they are.
    """

    def __init__(self, shards: Sequence[DTensor], names: Sequence[str], stays: bool) -> None:
        self.shards = shards
        self.names = names
        self.stays = stays
        self.is_whole = False
        self.wholes = [nn.Parameter(_without_memory(shard), shard.requires_grad) for shard in shards]
        # Written to through aliases with versions of their own: autograd takes what it keeps for unchanged.
        self._aliases = [whole.data for whole in self.wholes]

    def gather(self) -> None:
        """Fills the whole parameters, together with all ranks."""
        with torch.no_grad():
            for shard, alias in zip(self.shards, self._aliases, strict=True):
                storage = alias.untyped_storage()
                storage.resize_(alias.numel() * alias.element_size())
                alias.copy_(shard.full_tensor())
        self.is_whole = True

    def free(self) -> None:
        """Frees their memory."""
        for alias in self._aliases:
            alias.untyped_storage().resize_(0)
        self.is_whole = False


class _Gathering(TorchDispatchMode):
    """Gathers the units that an operation reads before it runs."""

    def __init__(self, units: Sequence[_Unit]) -> None:
        super().__init__()
        self._units = units
        self._by_storage = {
            whole.untyped_storage()._cdata: (unit, name)
            for unit in units
            for whole, name in zip(unit.wholes, unit.names, strict=True)
        }

    def unit(self, tensor: Tensor) -> tuple[_Unit, str] | None:
        """The unit and the name of the parameter whose memory a tensor has."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return None
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Results of here belong to one operation: autograd makes views of them.
        with anew():
            # Torch makes other views of memory that is there alone.
            if func is not torch.ops.aten.detach.default:
                self._gather(func, args, kwargs)
            return func(*args, **kwargs)

    def _gather(self, func: Any, args: Any, kwargs: Any) -> None:
        found = [
            place
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and (place := self.unit(leaf))
        ]
        if not found:
            return
        if func._schema.is_mutable:
            self._refuse_writes(func, args, kwargs)
        # In the order of the arguments, which all ranks have in common.
        needed = list(dict.fromkeys(unit for unit, _ in found))
        missing = [unit for unit in needed if not unit.is_whole]
        if missing:
            for unit in self._units:
                if unit.is_whole and not unit.stays and unit not in needed:
                    unit.free()
        for unit in missing:
            unit.gather()

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and (place := self.unit(leaf)):
                    raise RuntimeError(
                        f"{place[1]}: a forward writes to this sharded parameter (as an embedding with max_norm does), "
                        "of which every rank has a gathered copy alone; keep that module out of fully_shard"
                    )


def mean_over_ranks(
    factor: Tensor, gradients: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[Tensor | None]:
    """The means over all ranks of ``factor`` times the gradients, sharded as the parameters are.

    Args:
        factor: of this rank.
        gradients: of this rank, whole; None where it has none. Where no rank has one, there is none.
        params: these are sharded, or the same on all ranks.
    """
    used = torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=factor.device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    means: list[Tensor | None] = [None] * len(params)
    replicated: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for number, (gradient, p, is_used) in enumerate(zip(gradients, params, used.tolist(), strict=True)):
        if not is_used:
            continue
        if gradient is None:
            gradient = torch.zeros(p.shape, dtype=p.dtype, device=factor.device)
        # Sums of few bits are not added up in few bits.
        dtype = torch.promote_types(p.dtype, torch.float32)
        share = gradient.to(dtype) * (factor / dist.get_world_size()).to(dtype)
        if _is_distributed(p):
            means[number] = _scattered(share, p).to(p.dtype)
        else:
            replicated.setdefault(dtype, []).append((number, share))
    for shares in replicated.values():
        flat = torch.cat([share.flatten() for _, share in shares])
        dist.all_reduce(flat)
        parts = flat.split([share.numel() for _, share in shares])
        for (number, share), part in zip(shares, parts, strict=True):
            means[number] = part.view(share.shape).to(params[number].dtype)
    return means


def check_replicated(params: dict[str, Tensor]) -> None:
    """Compares the parameters that are not sharded with those of the other ranks.

    Raises:
        ValueError: on every rank, where they differ.
    """
    plain = {name: p.detach() for name, p in params.items() if not _is_distributed(p) and p.numel()}
    if not plain:
        return
    sums = torch.stack([torch.stack([p.double().sum(), p.double().square().sum()]) for p in plain.values()])
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differing = (extremes[0] != -extremes[1]).any(1).tolist()
    names = [name for name, differs in zip(plain, differing, strict=True) if differs]
    if names:
        raise ValueError(
            "model: expected parameters that are not sharded to be the same on all ranks, got others in "
            f"{', '.join(names)}; make the model with the same seed everywhere, or load the same state"
        )


def _scattered(gradient: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh
    whole = DTensor.from_local(gradient, mesh, [Partial()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def _is_distributed(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _check(name: str, shard: DTensor) -> None:
    mesh = shard.device_mesh
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"{name}: expected a mesh of all {dist.get_world_size()} ranks, whose mean the meta-gradient is, "
            f"got one of {mesh.size()}"
        )
    if sum(not placement.is_replicate() for placement in shard.placements) > 1:
        raise ValueError(
            f"{name}: expected to be sharded by fully_shard alone, got {shard.placements}; tensor parallelism computes "
            "with shards, and tasks with whole parameters"
        )
    if shard.to_local().device.type != mesh.device_type:
        raise ValueError(
            f"{name}: expected on {mesh.device_type}, where its mesh is, got {shard.to_local().device.type}; "
            "fully_shard it without an offload_policy"
        )


def _without_memory(shard: DTensor) -> Tensor:
    tensor = torch.empty(shard.shape, dtype=shard.dtype, device=shard.to_local().device)
    tensor.untyped_storage().resize_(0)
    return tensor


def _hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """FSDP's hooks of a module: the dict, and the number in it."""
    dicts: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    for hooks in dicts:
        for number, hook in hooks.items():
            if _state_of(hook) is not None:
                yield hooks, number


def _state_of(hook: Any) -> Any:
    """The state of FSDP whose hook this is; None for any other hook."""
    # Modules that are sharded together have functions around its methods.
    while hook is not None:
        owner = getattr(hook, "__self__", None)
        if type(owner).__module__.startswith("torch.distributed.fsdp."):
            return owner
        hook = getattr(hook, "__wrapped__", None)
    return None


def _state(module: nn.Module) -> Any:
    found = [_state_of(hooks[number]) for hooks, number in _hooks(module)]
    if not found:
        raise RuntimeError("fully_shard: expected forward hooks on its module, found none; this torch is not known")
    return found[0]


def _check_policy(module: nn.Module) -> None:
    policy = getattr(_state(module), "_mp_policy", None)
    if getattr(policy, "param_dtype", None) or getattr(policy, "output_dtype", None):
        raise ValueError(
            "model: expected fully_shard without an mp_policy, whose casts are in hooks that tasks do not pass; call the "
            "learner inside of torch.autocast instead"
        )


def _stays_gathered(module: nn.Module) -> bool:
    """Whether the user asked for it by ``reshard_after_forward=False``."""
    state = _state(module)
    groups = getattr(state, "_fsdp_param_groups", None) or []
    asked = not getattr(state, "_auto_reshard_after_forward", True)
    return asked and all(group.post_forward_mesh_info is None for group in groups)
