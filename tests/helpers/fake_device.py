"""A fake device that computes on the CPU: test the device handling of GPU code without a GPU.

Its tensors report device `fakegpu:0` and wrap an ordinary tensor. An operation that mixes them with CPU
tensors fails, as on a GPU. Every copy between the two and every read of a value is recorded with its place in
the code; live and peak bytes are counted. Streams, pinned memory, kernels and NCCL are not simulated.

Import it in a separate process: torch supports one such device, and it can't be removed.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
READS = {
    "aten._local_scalar_dense.default",
    "aten.is_nonzero.default",
    "aten.nonzero.default",
    "aten.equal.default",
}
COPIES = {"aten._to_copy.default", "aten.copy_.default"}


class _Backend:
    """The functions that torch expects in the module torch.fakegpu."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """No-op: computation and random numbers are the CPU's."""

    def synchronize(self, device: Any = None) -> None:
        NOTED["synchronize", "", place()] += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
NOTED: Counter[tuple[str, str, str]] = Counter()  # (what, how, place) -> count


class Memory:
    """Bytes of live storages on the device; a storage viewed by several tensors counts once."""

    live = peak = 0
    _views: Counter[int] = Counter()  # address of the first byte -> number of tensors

    @classmethod
    def add(cls, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        if not cls._views[start]:
            cls.live += size
            cls.peak = max(cls.peak, cls.live)
        cls._views[start] += 1
        weakref.finalize(tensor, cls._release, start, size)

    @classmethod
    def _release(cls, start: int, size: int) -> None:
        cls._views[start] -= 1
        cls.live -= 0 if cls._views[start] else size


class Fake(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Fake:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner
        Memory.add(inner)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fake({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


class OnFakeDevice(TorchDispatchMode):
    """Context in which tensors can be created on the device and moved to it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def place() -> str:
    """The innermost stack frame in the package's own code, as file:function."""
    for frame in reversed(traceback.extract_stack()):
        if any(f"/{room}/" in frame.filename for room in ("trainer", "models", "data")) and (
            "/site-packages/" not in frame.filename and not frame.name.startswith("<")
        ):
            return f"{frame.filename.rpartition('/')[2]}:{frame.name}"
    return "elsewhere"


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(operation)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    fakes = [tensor for tensor in tensors if isinstance(tensor, Fake)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    to_device = bool(fakes) if asked is None else asked == NAME
    _note(name, args, kwargs, fakes, asked)
    mixed = [t for t in tensors if not isinstance(t, Fake) and t.device.type == "cpu" and t.dim() > 0]
    if fakes and mixed and name not in COPIES:
        raise RuntimeError(f"{name} mixes {NAME} and cpu in {place()}")
    inner_kwargs = tree_map(_inner, kwargs)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = operation(*tree_map(_inner, args), **inner_kwargs)
    if name == "aten.copy_.default":
        return args[0]

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Fake):
            return value
        in_place = next((fake for fake in fakes if fake.inner is value), None)
        return in_place if in_place is not None else Fake(value) if to_device else value

    return tree_map(wrapped, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Fake) else value


def _note(name: str, args: Any, kwargs: dict[str, Any], fakes: list[Fake], asked: str | None) -> None:
    if fakes and name in READS:
        NOTED["read", "", place()] += 1
    if name == "aten._to_copy.default" and asked is not None:
        source, target, waits = isinstance(args[0], Fake), asked == NAME, not kwargs.get("non_blocking")
    elif name == "aten.copy_.default":
        source, target = isinstance(args[1], Fake), isinstance(args[0], Fake)
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    else:
        return
    if source != target:
        NOTED["to the device" if target else "from the device", "waits" if waits else "", place()] += 1


# Kernels that torch calls without going through __torch_dispatch__.
_library = torch.library.Library("aten", "IMPL")


def _empty(size: Any, dtype: Any = None, **_: Any) -> Fake:
    return Fake(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Fake:
    return Fake(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    _inner(target).copy_(_inner(source))
    return target


_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
torch.__future__.set_overwrite_module_params_on_conversion(True)


# Autocast for the networks tested here: the first group runs in bf16, the second in fp32, others unchanged.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _cast(name: str, dtype: torch.dtype) -> None:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    _library.impl(name, kernel, "AutocastPrivateUse1")


for _name in ("linear", "matmul", "scaled_dot_product_attention"):
    _cast(_name, torch.bfloat16)
for _name in ("layer_norm", "softmax.int", "cross_entropy_loss"):
    _cast(_name, torch.float32)
