"""What happens in a `with`: memory that is alive, FLOPs, bytes moved and sent, by phase.

It sees operators as PyTorch dispatches them, whatever made them: our modules, Megatron-Core's,
Transformers', autograd's backward pass. Meant for the meta device, where nothing is computed; it
works the same where something is.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from dspark_megatron.planning.observing.collectives import collective, span
from dspark_megatron.planning.observing.operators import flops, moved
from dspark_megatron.planning.observing.storages import Peak, Storages
from dspark_megatron.planning.observing.work import Sent, Work, summed

KEPT = "activations kept for the backward pass"
OTHER = "other"


def made_in(phase: str) -> str:
    return f"made in {phase}"


class Observer(TorchDispatchMode):
    """Of one device. What a phase makes goes by it until it is named or saved by autograd."""

    def __init__(self, device: torch.device, groups: dict[str, str] | None = None) -> None:
        """groups: what a process group is for, in words, by its `group_name`."""
        super().__init__()
        self.storages = Storages(device)
        self.groups = groups or {}
        self.peaks: dict[str, Peak] = {}
        """The highest moment of each phase."""
        self._work: dict[str, list[Work]] = defaultdict(list)
        self._phase, self._part, self._kind = OTHER, OTHER, made_in(OTHER)
        self._nameless = {self._kind}
        self._open: list[contextlib.ExitStack] = []

    @property
    def alive(self) -> dict[str, int]:
        """Bytes by kind, now."""
        return {kind: size for kind, size in self.storages.alive.items() if size}

    @property
    def work(self) -> dict[str, Work]:
        """By part of a step."""
        found = {}
        for part, works in self._work.items():
            sent = summed(tuple(one for work in works for one in work.sent))
            flops_, moved_ = (sum(getattr(work, n) for work in works) for n in ("flops", "moved"))
            found[part] = Work(flops_, moved_, sent)
        return found

    @contextlib.contextmanager
    def phase(self, name: str, part: str | None = None, kind: str | None = None) -> Iterator[None]:
        """name: of a moment whose highest memory is wanted; part: of the step that its work belongs
        to, the name up to its comma by default; kind: of what is made in it, if it has a name."""
        before = self._phase, self._part, self._kind
        self._phase, self._part = name, part or name.partition(",")[0]
        self._kind = kind or made_in(name)
        if kind is None:
            self._nameless.add(self._kind)
        self._look()
        try:
            yield
        finally:
            self._phase, self._part, self._kind = before

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what holds these tensors."""
        self.storages.rename(tensors, kind)
        self._look()

    def __enter__(self) -> "Observer":
        plain_resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain_resize(storage, size)
            self.storages.resized(storage)
            self._look()
            return result

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
            hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
            stack.enter_context(hooks)
            self._open.append(stack.pop_all())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.pop().close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # what it is made of comes by itself, such as a DTensor's shard
        kwargs = kwargs or {}
        if sent := collective(function, args, kwargs):
            self._send(*sent)
        elif _is_made_of_others(function):
            with self:
                return function.decompose(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # its modes have seen the call that led here
            out = function(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.follow(results)
        if sent is None:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(x.device.type == self.storages.device.type for x in (*given, *results)):
                self.add(flops(function, args, kwargs, out), moved(function, given, results))
        return out

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were made out of sight."""
        self.storages.follow(tensors, self._kind)
        self._look()

    def add(self, flops: int, moved: int = 0) -> None:
        """Work that no operator shows, to the part of the phase."""
        self._work[self._part].append(Work(flops, moved))

    def _send(self, kind: str, group: dist.ProcessGroup, handed: int) -> None:
        size = dist.get_world_size(group)
        words = self.groups.get(group.group_name) or f"{self._part}, {group.group_desc}"
        if size > 1:
            sent = Sent(kind, words, size, span(group), handed, 1)
            self._work[self._part].append(Work(0, 0, (sent,)))

    def _save(self, tensor: Tensor) -> Tensor:
        self.storages.rename([tensor], KEPT, of=self._nameless)
        return tensor

    def _look(self) -> None:
        if self.storages.total > self.peaks.get(self._phase, Peak()).total:
            self.peaks[self._phase] = Peak(self.storages.total, self.alive)


@functools.cache
def _is_made_of_others(function: Any) -> bool:
    """And has no kernel of its own. Only in inference mode such operators arrive whole."""
    keys = torch._C.DispatchKey
    has = function.has_kernel_for_dispatch_key
    own = has(keys.CPU) or has(keys.Meta)
    return function.namespace == "aten" and has(keys.CompositeImplicitAutograd) and not own
