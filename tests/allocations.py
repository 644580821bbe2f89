"""Which memory is allocated while a piece of code runs, by whom, and what of it is still alive: for tests of leaks and of recorded allocations."""

import contextlib
import functools
import gc
import mmap
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
ROOMS = tuple(str(ROOT / room) + "/" for room in ("nodes", "attention", "kernels"))
_OF_PYTHON = (str(Path(torch.__file__).parent), contextlib.__file__, functools.__file__)

_OF_NEW = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)  # what torch.tensor has just made, which no other op shows


def asked_for_by():
    """"file:line" that asks for what torch does now: the innermost place that is neither torch's nor this module's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*_OF_PYTHON, __file__)):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def is_ours(place):
    """Whether a place is in the pack's own files."""
    return place.startswith(ROOMS)


def storages_of(value):
    """Every storage in a structure of tensors, by its address."""
    return {part.untyped_storage()._cdata: part.untyped_storage() for part in tree_leaves(value) if isinstance(part, torch.Tensor)}


class Allocations(TorchDispatchMode):
    """Sees every tensor that is made: `made(storage, place)` is called for each new piece of memory, while `watching`."""

    watching = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.watching:
            known = {} if func in _OF_NEW else storages_of((args, kwargs))
            for address, storage in storages_of(result).items():
                if address not in known:
                    self.made(storage, asked_for_by())
        return result

    def made(self, storage, place):
        raise NotImplementedError


class OfOurs(Allocations):
    """Keeps an eye on all memory that the pack's own files ask for."""

    def __init__(self):
        super().__init__()
        self._made = []

    def made(self, storage, place):
        if is_ours(place):
            self._made.append((StorageWeakRef(storage), place))

    @property
    def count(self):
        return len(self._made)

    def alive(self):
        """Where what is still alive was asked for."""
        gc.collect()
        return sorted({place for storage, place in self._made if not storage.expired()})


class Recording(Allocations):
    """A host that records allocations and replays them in the next step, as ComfyUI 0.34 and later may on a GPU.

    Its rules are those of comfy-aimdo's malloc graph. What is allocated in a scope has to be free again when the scope ends. While
    recording is paused, allocations are nobody's, and what was recorded must not be freed. A pause is a switch that does not count: whoever
    ends one, ends it for all. `broken`: what went against that, in words.
    """

    def __init__(self):
        super().__init__()
        self.paused, self.broken, self.scopes, self.pauses = False, [], [], 0

    @property
    def watching(self):
        return bool(self.scopes) and not self.paused

    def made(self, storage, place):
        self.scopes[-1].append((StorageWeakRef(storage), place))

    def _recorded(self):
        return [(storage, place) for scope in self.scopes for storage, place in scope if not storage.expired()]

    @contextlib.contextmanager
    def pause_malloc_graph(self, sync=False):
        self.pauses += 1
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, paused):
        if not self.scopes:
            return
        if paused and not self.paused:
            self._before = self._recorded()
        elif self.paused and not paused:
            self.broken += [f"freed while paused: {place}" for storage, place in self._before if storage.expired()]
        self.paused = paused

    def scope(self, call):
        """What `call` returns; of what it allocates that alone may live on."""
        self.scopes.append([])
        collects = gc.isenabled()
        gc.disable()  # when it collects is chance: a cycle that holds memory has to show
        try:
            result = call()
        finally:
            made = self.scopes.pop()
            if collects:
                gc.enable()
            if not self.scopes:
                if self.paused:
                    self.broken.append("a pause was never ended")
                self.paused = False
        returned = storages_of(result)
        alive = [(storage, place) for storage, place in made if not storage.expired()]
        self.broken += [f"still allocated: {place}" for storage, place in alive if storage.cdata not in returned]
        if self.scopes:  # the outer one waits for what this one returns
            self.scopes[-1] += [(storage, place) for storage, place in alive if storage.cdata in returned]
        return result


@contextlib.contextmanager
def no_large_pages():
    """All memory through torch, so that it is seen: the torch backend takes large tables from the system itself."""
    kept = vars(mmap).get("MADV_HUGEPAGE")
    if kept is not None:
        del mmap.MADV_HUGEPAGE
    try:
        yield
    finally:
        if kept is not None:
            mmap.MADV_HUGEPAGE = kept
