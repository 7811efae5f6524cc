"""Megatron-Core on a machine without a GPU: the one place that knows what it then needs.

Megatron-Core names CUDA in places where it only wants "the device". `install()` redirects exactly
those calls to the CPU, for megatron-core 0.16 to 0.19; it does nothing where CUDA is available.
It must run before anything imports megatron.
"""

import contextlib
import functools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from dspark_megatron.errors import ConfigError

_INSTALLED = "_dspark_megatron_cpu"


def install() -> bool:
    """Make Megatron-Core run on the CPU; returns whether anything was changed."""
    if torch.cuda.is_available() or hasattr(torch.cuda, _INSTALLED):
        return False
    # Their kernels need a driver; without them Megatron-Core takes its PyTorch paths.
    modules: dict[str, Any] = sys.modules
    for name in ("transformer_engine", "apex"):
        modules.setdefault(name, None)
    # torch._dynamo indexes torch's functions by identity when it is first imported, and
    # `with torch.device(...)` caches them: both must see the originals.
    import megatron.core.optimizer  # noqa: F401
    import megatron.core.tensor_parallel.random as random

    torch.utils._device._device_constructors()
    setattr(torch.cuda, _INSTALLED, True)
    _redirect_device_calls()
    _redirect_factories()
    _name_cpu_tensors_as_cuda()
    _use_cpu_random_state(random)
    _share_gloo_device()
    return True


class _Nothing:
    """Stands for a CUDA stream or event: there is nothing to order on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        return lambda *args, **kwargs: _Nothing()


def _redirect_device_calls() -> None:
    """`torch.cuda.current_device()` is used as a device argument all over Megatron-Core."""
    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 1  # the async checkpoint worker takes rank % device_count
    # One function for each name: dynamo refuses an object that has two.
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = _Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    tensor.cuda = lambda self, *args, **kwargs: self


def _redirect_factories() -> None:
    """Scalars for norms and scalers are made with `device="cuda"` written out."""
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _name_cpu_tensors_as_cuda() -> None:
    """The optimizers compare `param.type()` with 'torch.cuda.*Tensor' strings."""
    tensor: Any = torch.Tensor
    plain_type = tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.")
        return result

    tensor.type = tensor_type


def _use_cpu_random_state(random: Any) -> None:
    """Megatron-Core's tracker of parallel random states, over the CPU generator."""

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or its seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random.CudaRNGStatesTracker = CpuRngStatesTracker
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _share_gloo_device() -> None:
    """All gloo groups of a process share one device, or one for each interface that
    GLOO_SOCKET_IFNAME names. Each would have its own, whose thread wakes a hundred times a second,
    and Megatron-Core makes thirty groups and more on each rank."""
    if not dist.is_gloo_available():
        return
    gloo: Any = dist.ProcessGroupGloo
    plain_init = gloo.__init__

    @functools.cache  # at the first group, not before: a fork would not have their threads
    def devices() -> list[Any]:
        names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        known = [name for _, name in socket.if_nameindex()]
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME names {', '.join(unknown)}, which this machine does not have; "
                f"its network interfaces are {', '.join(known)}"
            )
        named = [gloo.create_device(interface=name) for name in names]
        return named or [gloo.create_default_device()]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) == 3 and kwargs.keys() == {"timeout"}:  # how PyTorch makes a group
            options = gloo._Options()
            options._devices, options._timeout = devices(), kwargs["timeout"]
            options._threads = 2 * len(devices())
            args, kwargs = (*args, options), {}
        plain_init(self, *args, **kwargs)

    gloo.__init__ = init
