"""Calls of a meta-learner as programs: recorded at the first call of a kind, replayed at the next ones."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.acceleration import is_own_hook
from metafast.backend import requested_backend
from metafast.engine.capture_call import Call
from metafast.engine.capture_check import Check
from metafast.engine.freed_memory import give_back
from metafast.engine.module_attributes import Attributes, Change, tensors_in
from metafast.engine.replay_state import RandomState
from metafast.engine.state_after_call import of_last_task
from metafast.engine.stray_tensors import fake_strays, forget
from metafast.inner import Rule
from metafast.program import NotRecordableError, Program

logger = logging.getLogger("metafast")

# Each holds the intermediate values of a step.
KEPT = 8
# So many in a row are worth a warning.
RECORDINGS = 4

Key = tuple[tuple[str, Any], ...]


class Capture:
    """Records and replays functions of a module's parameters and buffers and of other tensors.

    Args:
        module: the functions use its parameters and buffers. Its ``capture_check`` is the number of replays that are
            compared with the function itself.
        watched: names of its attributes (modules or other objects) on which the functions may set attributes.
    """

    def __init__(self, module: nn.Module, watched: tuple[str, ...] = ()) -> None:
        self._module = module
        self._watched = watched
        self._programs: OrderedDict[Any, _Kept] = OrderedDict()
        # Kinds of the latest calls, as long as none was replayed.
        self._recordings: list[Key] = []
        self._warned = False
        # Attributes that replays put tensors into, and that no program reads.
        self._left: set[tuple[int, Any]] = set()
        # Whether programs read parameters where they are, until one is found elsewhere.
        self._in_place = True

    def replay(self, name: str, function: Callable[..., Any], *arguments: Any, update_buffers: bool = True) -> Any:
        """``function(*arguments)`` without a graph.

        It is recorded where the name, the structure or shapes of the arguments, or anything in :meth:`_settings` is new.

        Args:
            name: name of the program.
            function: gives a pytree of tensors; runs with the module's parameters as leaves of a graph of its own.
            arguments: pytrees of tensors; None stands for itself.
            update_buffers: whether buffers get the values that the function leaves in them.

        Raises:
            NotRecordableError: see :func:`metafast.program.recording`; or the function leaves an attribute or a cache as a
                replay would not.
            RuntimeError: a replay differs from the function.
        """
        leaves, structure = pytree.tree_flatten(arguments)
        state, names = self._state()
        inputs = [*(tensor.detach() for tensor in state.values()), *(leaf for leaf in leaves if leaf is not None)]
        call = Call(self._module, state, function, structure, [leaf is None for leaf in leaves])

        def key() -> Key:
            return (
                ("the call", name),
                ("structure of the batches", str(structure)),
                ("None in the batches", tuple(leaf is None for leaf in leaves)),
                ("shapes, dtypes or devices", tuple((t.shape, t.dtype, t.device) for t in inputs)),
                ("what requires a gradient", tuple(tensor.requires_grad for tensor in state.values())),
                ("names of parameters and buffers", names),
                *self._settings(inputs[0].device.type),
            )

        kind = key()
        if kind in self._programs and not self._programs[kind].program.fits(inputs):
            # Somebody puts others into their places (``p.data = …``), and may do so each time.
            self._in_place = False
            del self._programs[kind]
        if kind not in self._programs:
            kept = self._recorded(name, call, inputs)
            # The first call may have made attributes that the next ones find.
            kind = key()
            self._programs[kind] = kept
            self._recordings.append(kind)
            self._warn()
            if len(self._programs) > KEPT:
                self._programs.popitem(last=False)
        else:
            self._recordings.clear()
        self._programs.move_to_end(kind)
        kept = self._programs[kind]
        try:
            result, values, left = kept.check.replay(kept.program, call, inputs, self._attributes)
        except RuntimeError:
            del self._programs[kind]
            raise
        for place, tensor in zip(kept.left, left, strict=True):
            if place is not None:
                place[0][place[1]] = tensor
        if update_buffers:
            for buffer, value in zip(kept.buffers, values, strict=True):
                if buffer is not None:
                    state[buffer].copy_(value)
        return result

    def _recorded(self, name: str, call: Call, inputs: list[Tensor]) -> _Kept:
        started = time.perf_counter()
        recording = self._recorded_once(call, inputs)
        if recording.new:
            # An ordinary call makes what the next ones find, such as a mask, with numbers in it.
            random = RandomState(inputs[0].device)
            call.run(recording.program.copied(inputs))
            random.restore()
            give_back()
            recording = self._recorded_once(call, inputs)
            if recording.moving:
                raise NotRecordableError(
                    f"every call of model and loss_fn leaves something else in {', '.join(recording.moving)}, which a "
                    "replay would not: keep it in a buffer, return it from loss_fn as a metric, or use capture=False"
                )
        program = recording.program
        seconds, mebibytes = time.perf_counter() - started, program.bytes / 2**20
        logger.info("capture: recorded %s in %.1f s, %.0f MiB of intermediate values", name, seconds, mebibytes)
        # What was recorded knows which of the buffers did change.
        written = dict(zip(call.state, program.writes, strict=False))
        parameters = [name for name, _ in self._module.named_parameters() if written.get(name)]
        if parameters:
            raise NotRecordableError(
                f"the forward writes to the parameter {', '.join(parameters)} (as an embedding with max_norm does), which a "
                "replay would not: use capture=False"
            )
        buffers = [name if new or written[name] else None for name, new in recording.buffers.items()]
        self._left.update((id(place[0]), place[1]) for place in recording.left if place is not None)
        return _Kept(program, buffers, recording.left, Check(self._replays(), seconds, inputs))

    def _recorded_once(self, call: Call, inputs: list[Tensor]) -> _Recording:
        """Records a program and puts attributes and buffers back as they were before."""
        before = self._attributes()
        buffers: dict[str, bool] = {}
        # What changed: tensors, by themselves or inside of something, and everything else.
        made: list[tuple[Change, Tensor]] = []
        others: list[str] = []

        def run(*tensors: Tensor) -> Any:
            result, values = call.run(list(tensors), buffers)
            for change in before.changes():
                inside = [(change, tensor) for tensor in tensors_in(change.now)]
                made.extend(inside)
                if not inside:
                    others.append(change.path)
            return result, values, [of_last_task(tensor) for _, tensor in made]

        try:
            program = Program(run, inputs, self._staying(call.state))
        finally:
            before.restore()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in program.reached):
            raise NotRecordableError(
                "model and loss_fn reach a tensor that requires a gradient and is no parameter of the learner, so that it "
                "would get none: make it one, or switch it off by requires_grad_(False)"
            )
        new = [*others, *(change.path for change, _ in made)]
        left, moving = _places(program, made)
        # What is left elsewhere is found by what is alive.
        made.clear()
        if strays := fake_strays(program.mode):
            others.append(forget(strays))
            new.append(others[-1])
        return _Recording(program, buffers, left, new, moving=[*others, *moving])

    def _staying(self, state: dict[str, Tensor]) -> list[int]:
        """Numbers of the inputs that programs read where they are: parameters. Buffers may be copies of each call's own."""
        parameters = {name for name, _ in self._module.named_parameters()} if self._in_place else ()
        return [number for number, name in enumerate(state) if name in parameters]

    def _replays(self) -> int:
        replays: Any = getattr(self._module, "capture_check", 0)
        return int(replays)

    def _attributes(self) -> Attributes:
        return Attributes(*(getattr(self._module, name) for name in self._watched))

    def _state(self) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """The module's parameters and buffers by their first names; and all their names, each with the first name."""
        first: dict[int, str] = {}
        state: dict[str, Tensor] = {}
        names = []
        for name, tensor in itertools.chain(
            self._module.named_parameters(remove_duplicate=False), self._module.named_buffers(remove_duplicate=False)
        ):
            known = first.setdefault(id(tensor), name)
            state.setdefault(known, tensor)
            names.append((name, known))
        return state, tuple(names)

    def _warn(self) -> None:
        """Says once that every call is recorded, and why."""
        if self._warned or len(self._recordings) < RECORDINGS:
            return
        self._warned = True
        before, now = (dict(kind) for kind in self._recordings[-2:])
        changed = [label for label in {**before, **now} if before.get(label, ...) != now.get(label, ...)]
        logger.warning(
            "capture: the latest %d calls were all recorded, which takes long, and none was replayed, since each time "
            "something was new: %s",
            RECORDINGS,
            ", ".join(changed),
        )

    def _settings(self, device: str) -> Iterator[tuple[str, Any]]:
        """The settings that the module's functions depend on besides tensors, by name."""
        yield "grad mode", torch.is_grad_enabled()
        yield "backend", requested_backend()
        yield "autocast", (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        yield "default dtype", torch.get_default_dtype()
        for name, module in self._module.named_modules():
            yield from self._module_settings(name, module, _NO_SETTINGS if name else _NO_OPTIONS)

    def _module_settings(self, path: str, module: nn.Module, without: frozenset[str]) -> Iterator[tuple[str, Any]]:
        """The settings of a module that may change between calls: numbers, strings, plain tensors, hooks."""
        own = vars(module)
        yield f"class of {path}", type(module)
        for name, value in own.items():
            if name not in without and (id(own), name) not in self._left:
                yield f"{path}.{name}" if path else name, _setting(value)
        for kind in _HOOKS:
            yield f"{path}.{kind}", tuple(number for number, hook in own[kind].items() if not is_own_hook(hook))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles record their own."""
        return {**vars(self), "_programs": OrderedDict(), "_recordings": [], "_left": set()}


Place = tuple[Any, Any]


class _Kept(NamedTuple):
    """A program, and the places of its results.

    Attributes:
        program: gives the function's result, the values of buffers, and tensors that the function leaves in attributes.
        buffers: names of the buffers, in the order of their values; None for a buffer that the program does not change.
        left: places of the tensors that are left in attributes; None for an attribute that stays as it is.
        check: the comparison of the first replays.
    """

    program: Program
    buffers: list[str | None]
    left: list[Place | None]
    check: Check


class _Recording(NamedTuple):
    """A recorded program and what it leaves behind.

    Attributes:
        program: gives the function's result, the values of buffers, and tensors that were left in attributes.
        buffers: the buffers that may have changed, by name, and whether other tensors took their places.
        left: as in :class:`_Kept`.
        new: attributes and caches that the call changed.
        moving: the changed attributes and caches that a replay cannot leave as the call does.
    """

    program: Program
    buffers: dict[str, bool]
    left: list[Place | None]
    new: list[str]
    moving: list[str]


_NO_SETTINGS = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The outcome is of the call before, the memory plan for the shapes that a program is of.
_NO_OPTIONS = _NO_SETTINGS | {"outcome", "memory_plan"}


def _places(program: Program, made: list[tuple[Change, Tensor]]) -> tuple[list[Place | None], list[str]]:
    """The places of the last tensors of a program's results, and the paths where a replay cannot put them.

    A value that is the same at every call stays as an ordinary call made it. An attribute that the call does not read gets
    the tensor of each replay.
    """
    read = {id(tensor) for tensor in program.reached}
    left: list[Place | None] = []
    moving: list[str] = []
    constant = program.constant[len(program.constant) - len(made) :]
    for (change, tensor), is_constant in zip(made, constant, strict=True):
        left.append(None if is_constant else (change.holder, change.key))
        is_written = change.now is tensor and isinstance(change.before, Tensor) and id(change.before) not in read
        if not is_constant and not is_written and change.path not in moving:
            moving.append(change.path)
    return left, moving


def _setting(value: Any) -> Any:
    """An attribute as part of a key: numbers and strings by value, tensors by identity, since they are read live."""
    if type(value) is Tensor:
        return id(value)
    if isinstance(value, dict):
        return tuple((_setting(key), _setting(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_setting, value))
    return repr(value) if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """Whether an attribute is a setting: a number, a string, a rule."""
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device, Rule))
