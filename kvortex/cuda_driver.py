"""CUDA's driver through ctypes: the few calls of a transfer, without the layers above them.

A submission makes about five of them; each costs a fraction of a microsecond here. Any thread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from kvortex.core import TransferError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Addresses = npt.NDArray[np.uint64]

SUCCESS, NOT_READY = 0, 600
DISABLE_TIMING = 2
"""Without BLOCKING_SYNC: behind the 56th such event under way a record blocks the host (H200)."""
SRC_ACCESS_ORDER_STREAM = 1
USUAL_PARAMETERS = (8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 8, 8)
"""Of KVortex's kernel: its own eleven, and two pointers that Triton adds."""

Handle = int
"""A stream, event or function of the driver."""


class LaunchConfiguration(ctypes.Structure):
    """CUlaunchConfig of cuda.h: three sizes of the grid, three of a program, and so on.

    One structure prepared once is passed sooner than the eleven arguments of cuLaunchKernel.
    """

    _fields_ = (
        ("programs", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h; location hints are for managed memory only."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class CudaDriver:
    """One per process. Calls keep the GIL: to give it up would cost more than most of them take.

    Raises:
        TransferError: every method, if the driver reports an error.
        OSError: at construction, if there is no driver.
    """

    def __init__(self) -> None:
        self._library = ctypes.PyDLL("libcuda.so.1")
        void, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        self._launch = self._bind("cuLaunchKernelEx", void, void, void, void)
        self._record = self._bind("cuEventRecord", void, void)
        self._wait = self._bind("cuStreamWaitEvent", void, void, integer)
        self._query = self._bind("cuEventQuery", void)
        self._copy = self._bind("cuMemcpyAsync", void, void, size, void)
        self._create = self._bind("cuEventCreate", void, integer)
        self._destroy = self._bind("cuEventDestroy_v2", void)
        self._elapsed = self._bind("cuEventElapsedTime", void, void, void)
        self._batch, self._batch_tail = self._find_batch()
        self._attributes = _CopyAttributes(source_access_order=SRC_ACCESS_ORDER_STREAM)
        self._first = ctypes.c_size_t(0)

    def create_event(self, *, timed: bool = False) -> Handle:
        """An event; `seconds_between` is for timed ones only."""
        event = ctypes.c_void_p()
        self._check(self._create(ctypes.byref(event), 0 if timed else DISABLE_TIMING))
        assert event.value is not None
        return event.value

    def destroy_event(self, event: Handle) -> None:
        """Give an event back."""
        self._check(self._destroy(event))

    def record(self, event: Handle, stream: Handle) -> None:
        """Put an event behind the stream's work so far."""
        if status := self._record(event, stream):
            self._check(status)

    def wait(self, stream: Handle, event: Handle) -> None:
        """Let a stream go on only once the event's last `record` was reached."""
        if status := self._wait(stream, event, 0):
            self._check(status)

    def reached(self, event: Handle) -> bool:
        """Whether the event's last `record` was reached."""
        status: int = self._query(event)
        if status == NOT_READY:
            return False
        self._check(status)
        return True

    def seconds_between(self, first: Handle, last: Handle) -> float:
        """From one timed event to another, both reached; negative if it is the other way round."""
        milliseconds = ctypes.c_float()
        self._check(self._elapsed(ctypes.byref(milliseconds), first, last))
        return milliseconds.value / 1e3

    def current_context(self) -> Handle:
        """The context of this thread."""
        context = ctypes.c_void_p()
        self._check(self._library.cuCtxGetCurrent(ctypes.byref(context)))
        return context.value or 0

    def use_context(self, context: Handle) -> None:
        """Let this thread work in a context of another."""
        self._check(self._library.cuCtxSetCurrent(ctypes.c_void_p(context)))

    def launch(self, configuration: int, function: Handle, parameters: int) -> None:
        """Launch a kernel.

        Args:
            configuration: address of a LaunchConfiguration.
            function: the kernel.
            parameters: address of an array of pointers to its parameters.
        """
        if status := self._launch(configuration, function, parameters, None):
            self._check(status)

    def copy(self, destination: int, source: int, nbytes: int, stream: Handle) -> None:
        """Copy contiguous bytes; the direction follows from the addresses."""
        if status := self._copy(destination, source, nbytes, stream):
            self._check(status)

    def copy_batch(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses, stream: Handle
    ) -> None:
        """Copy many pieces with one call, or one call each where the driver has no such call."""
        if self._batch is None:
            rows = zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True)
            for destination, source, nbytes in rows:
                self.copy(destination, source, nbytes, stream)
        elif len(sizes):
            status = self._batch(
                destinations.ctypes.data,
                sources.ctypes.data,
                sizes.ctypes.data,
                len(sizes),
                ctypes.addressof(self._attributes),
                ctypes.addressof(self._first),
                1,
                *self._batch_tail,
                stream,
            )
            self._check(status)

    def parameter_sizes(self, function: Handle) -> list[int]:
        """Bytes of each parameter of a kernel, also of those that its compiler added."""
        if not hasattr(self._library, "cuFuncGetParamInfo"):  # before CUDA 12.4
            return list(USUAL_PARAMETERS)
        void = ctypes.c_void_p
        find = self._bind("cuFuncGetParamInfo", void, ctypes.c_size_t, void, void)
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        sizes: list[int] = []
        while find(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == SUCCESS:
            sizes.append(size.value)
        return sizes

    def _find_batch(self) -> tuple[Any, tuple[object, ...]]:
        """The call and what stands between its attributes and its stream, which CUDA 13 dropped."""
        void, size = ctypes.c_void_p, ctypes.c_size_t
        arguments = [void, void, void, size, void, void, size]
        if hasattr(self._library, "cuMemcpyBatchAsync_v2"):
            return self._bind("cuMemcpyBatchAsync_v2", *arguments, void), ()
        if hasattr(self._library, "cuMemcpyBatchAsync"):
            failed = ctypes.c_size_t()
            return self._bind("cuMemcpyBatchAsync", *arguments, void, void), (ctypes.byref(failed),)
        return None, ()

    def _bind(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401  (ctypes has no types)
        call = getattr(self._library, name)
        call.argtypes, call.restype = list(arguments), ctypes.c_int
        return call

    def _check(self, status: int) -> None:
        if status == SUCCESS:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        raise TransferError(f"CUDA reported: {(text.value or b'unknown').decode()} ({status})")


@cache
def cuda_driver() -> CudaDriver:
    """The driver of this process."""
    return CudaDriver()
