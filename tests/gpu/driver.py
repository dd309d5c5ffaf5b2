"""NVIDIA's driver by ctypes, as tests/gpu/lease.py uses it: memory, modules, launches and graphs, one stream.

Functions are found by cuGetProcAddress, as the engine does (csrc/cuda_driver.cpp): so the fake driver of
tests/fake_cuda does in place of NVIDIA's."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

VERSION = 12030  # of CUDA, whose forms of the functions are called
CAPABILITY_MAJOR, CAPABILITY_MINOR, DYNAMIC_SHARED, PROGRAMMATIC = 75, 76, 8, 6
PARAM_BUFFER, PARAM_SIZE = 1, 2


class DriverError(Exception):
    """A call of the driver that failed."""


class _Attribute(c.Structure):
    _fields_ = (("id", c.c_int32), ("pad", c.c_uint8 * 4), ("allowed", c.c_int32), ("rest", c.c_uint8 * 60))


class _Config(c.Structure):
    _fields_ = (
        ("grid", c.c_uint32 * 3),
        ("block", c.c_uint32 * 3),
        ("shared", c.c_uint32),
        ("stream", c.c_void_p),
        ("attributes", c.POINTER(_Attribute)),
        ("num_attributes", c.c_uint32),
    )


@dataclass(frozen=True)
class Function:
    """A loaded kernel and what a launch of it asks for."""

    handle: int
    threads: int
    shared_bytes: int


class Driver:
    """Device 0, with its primary context current to this thread. library: the driver's file."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._find = c.CDLL(library).cuGetProcAddress_v2
        self._find.argtypes = [c.c_char_p, c.POINTER(c.c_void_p), c.c_int32, c.c_uint64, c.POINTER(c.c_int32)]
        device, context, stream = c.c_int32(), c.c_void_p(), c.c_void_p()
        self.call("cuInit", c.c_uint32(0))
        self.call("cuDeviceGet", c.byref(device), c.c_int32(0))
        self.device = device
        self.call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", c.byref(stream), c.c_uint32(1))
        self.stream = stream

    def call(self, name: str, *arguments: object) -> None:
        """DriverError, with the driver's name for it, if the call fails."""
        if result := c.CFUNCTYPE(c.c_int32)(self._address(name))(*arguments):
            text = c.c_char_p()
            c.CFUNCTYPE(c.c_int32, c.c_int32, c.POINTER(c.c_char_p))(self._address("cuGetErrorName"))(
                result, c.byref(text)
            )
            raise DriverError(f"{name} failed: {(text.value or b'?').decode()} ({result})")

    def _address(self, name: str) -> int:
        address, found = c.c_void_p(), c.c_int32()
        self._find(name.encode(), c.byref(address), VERSION, 0, c.byref(found))
        if not address.value:
            raise DriverError(f"the driver has no {name}")
        return address.value

    @property
    def name(self) -> str:
        text = c.create_string_buffer(256)
        self.call("cuDeviceGetName", text, c.c_int32(255), self.device)
        return text.value.decode()

    @property
    def arch(self) -> int:
        """Compute capability, 10 * major + minor."""
        major, minor = c.c_int32(), c.c_int32()
        self.call("cuDeviceGetAttribute", c.byref(major), c.c_int32(CAPABILITY_MAJOR), self.device)
        self.call("cuDeviceGetAttribute", c.byref(minor), c.c_int32(CAPABILITY_MINOR), self.device)
        return 10 * major.value + minor.value

    def load(self, cubin: bytes, symbol: str, threads: int, shared_bytes: int) -> Function:
        module, function = c.c_void_p(), c.c_void_p()
        self.call("cuModuleLoadData", c.byref(module), c.c_char_p(cubin))
        self.call("cuModuleGetFunction", c.byref(function), module, c.c_char_p(symbol.encode()))
        if shared_bytes > 48 << 10:
            self.call("cuFuncSetAttribute", function, c.c_int32(DYNAMIC_SHARED), c.c_int32(shared_bytes))
        return Function(function.value or 0, threads, shared_bytes)

    def allocate(self, size: int) -> int:
        address = c.c_uint64()
        self.call("cuMemAlloc", c.byref(address), c.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree", c.c_uint64(address))

    @contextmanager
    def pinned(self, size: int) -> Iterator[int]:
        address = c.c_void_p()
        self.call("cuMemHostAlloc", c.byref(address), c.c_size_t(size), c.c_uint32(0))
        try:
            yield address.value or 0
        finally:
            self.call("cuMemFreeHost", address)

    def write(self, address: int, data: bytes) -> None:
        with self.pinned(len(data)) as host:
            c.memmove(host, data, len(data))
            self.call(
                "cuMemcpyHtoDAsync", c.c_uint64(address), c.c_void_p(host), c.c_size_t(len(data)), self.stream
            )
            self.synchronize()

    def read(self, address: int, size: int) -> bytes:
        with self.pinned(size) as host:
            self.call(
                "cuMemcpyDtoHAsync", c.c_void_p(host), c.c_uint64(address), c.c_size_t(size), self.stream
            )
            self.synchronize()
            return c.string_at(host, size)

    def fill(self, address: int, size: int, value: int) -> None:
        self.call("cuMemsetD8Async", c.c_uint64(address), c.c_ubyte(value), c.c_size_t(size), self.stream)

    def launch(
        self, function: Function, grid: Sequence[int], params: Sequence[int], *, programmatic: bool = False
    ) -> None:
        """params: addresses, packed one after the other. programmatic: may begin before the kernel before it
        has ended."""
        attribute = _Attribute(PROGRAMMATIC, allowed=1)
        config = _Config(
            (c.c_uint32 * 3)(*grid),
            (c.c_uint32 * 3)(function.threads, 1, 1),
            function.shared_bytes,
            self.stream,
            c.pointer(attribute),
            int(programmatic),
        )
        packed, size = (c.c_uint64 * len(params))(*params), c.c_size_t(8 * len(params))
        extra = (c.c_void_p * 5)(PARAM_BUFFER, c.addressof(packed), PARAM_SIZE, c.addressof(size), None)
        self.call("cuLaunchKernelEx", c.byref(config), c.c_void_p(function.handle), None, extra)

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    @contextmanager
    def graph(self) -> Iterator[list[c.c_void_p]]:
        """What is launched within is captured; the list then holds the graph, for replay()."""
        made: list[c.c_void_p] = []
        self.call("cuStreamBeginCapture", self.stream, c.c_int32(1))
        yield made
        captured, graph = c.c_void_p(), c.c_void_p()
        self.call("cuStreamEndCapture", self.stream, c.byref(captured))
        self.call("cuGraphInstantiateWithFlags", c.byref(graph), captured, c.c_uint64(0))
        self.call("cuGraphDestroy", captured)
        made.append(graph)

    def replay(self, graph: c.c_void_p) -> None:
        self.call("cuGraphLaunch", graph, self.stream)

    def drop(self, graph: c.c_void_p) -> None:
        self.call("cuGraphExecDestroy", graph)
