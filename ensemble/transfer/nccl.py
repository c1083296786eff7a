"""NCCL between two GPUs, without torch's process groups: their watchdog ends a process whose peer has died.

The communicator does not block: what it does is looked at until it is done, or ended by an abort when it takes longer
than it may, also before the other side has come. The library is the one that torch has loaded.
"""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ensemble.cache.block_copier import Copy, nap
from ensemble.errors import LinkBroken
from ensemble.parallel.tensor_parallel import keep_nccl_off_multicast

MEET_TIMEOUT_S = 60.0  # NCCL looks at all GPUs and network cards of the host, and loads its kernels
_SUCCESS, _IN_PROGRESS = 0, 7
_INT8 = 0
_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21400  # the fields of 2.14, which later versions take as well


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, list[Any]] = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(_POINTER),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ],
    "ncclCommGetAsyncError": [_POINTER, ctypes.POINTER(ctypes.c_int)],
    "ncclCommAbort": [_POINTER],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclSend": [_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _POINTER, _POINTER],
    "ncclRecv": [_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _POINTER, _POINTER],
}


@functools.cache
def _library() -> ctypes.CDLL:
    keep_nccl_off_multicast()
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise LinkBroken(f"nccl: {error}") from None
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.ncclGetErrorString.argtypes = [ctypes.c_int]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def version() -> str:
    """Of the library in use. Raises LinkBroken without one."""
    number = ctypes.c_int()
    _call("ncclGetVersion", ctypes.byref(number))
    return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"


def _call(name: str, *arguments: Any) -> None:
    """Raises LinkBroken for a failure; what is in progress is none."""
    library = _library()
    result = getattr(library, name)(*arguments)
    if result not in (_SUCCESS, _IN_PROGRESS):
        raise LinkBroken(f"nccl: {name}: {library.ncclGetErrorString(result).decode()}")


class NcclMeeting:
    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream, timeout_s: float, is_closing: Callable[[], bool]
    ) -> None:
        self._how = (device, stream, timeout_s, is_closing)
        unique_id = _UniqueId()
        with torch.cuda.device(device):
            _call("ncclGetUniqueId", ctypes.byref(unique_id))
        self.rendezvous = bytes(unique_id)

    def wait(self) -> "NcclPair":
        return NcclPair(self.rendezvous, 0, *self._how)


class NcclPair:
    """Used by one thread at a time."""

    def __init__(
        self,
        rendezvous: bytes,
        rank: int,
        device: torch.device,
        stream: torch.cuda.Stream,  # on which it sends and receives
        timeout_s: float,  # of a launch
        is_closing: Callable[[], bool],  # then nothing is waited for any more
    ) -> None:
        if len(rendezvous) != ctypes.sizeof(_UniqueId):
            raise LinkBroken(f"nccl: a unique id has 128 bytes, not {len(rendezvous)}")
        self._peer, self._device, self._stream = 1 - rank, device, stream
        self._timeout_s, self._is_closing = timeout_s, is_closing
        self._comm: _POINTER | None = _POINTER()
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        with torch.cuda.device(device):
            unique_id = _UniqueId.from_buffer_copy(rendezvous)
            try:
                _call("ncclCommInitRankConfig", ctypes.byref(self._comm), 2, unique_id, rank, ctypes.byref(config))
                self._wait(max(timeout_s, MEET_TIMEOUT_S))
            except LinkBroken:
                self.end()
                raise

    def send(self, runs: list[torch.Tensor]) -> Copy:
        return self._start("ncclSend", runs)

    def receive(self, runs: list[torch.Tensor]) -> Copy:
        return self._start("ncclRecv", runs)

    def check(self) -> None:
        self._has_progressed()

    def end(self) -> None:
        """Returns when nothing is under way: kernels that wait for the other side are told to return. What NCCL says
        of it is of no use.
        """
        comm, self._comm = self._comm, None
        if comm is not None and comm.value:
            with torch.cuda.device(self._device), contextlib.suppress(LinkBroken):
                _call("ncclCommAbort", comm)
            self._stream.synchronize()

    def _start(self, name: str, runs: list[torch.Tensor]) -> Copy:
        if self._comm is None:
            raise LinkBroken("nccl: the pair has ended")
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            began.record(self._stream)
            stream = _POINTER(self._stream.cuda_stream)
            _call("ncclGroupStart")
            try:
                for run in runs:
                    _call(name, _POINTER(run.data_ptr()), run.nbytes, _INT8, self._peer, self._comm, stream)
            finally:
                _call("ncclGroupEnd")  # else an abort would become a part of the group, and wait for its end
            self._wait(self._timeout_s)  # a thread of NCCL's launches it: what comes next on the stream comes after
            ended.record(self._stream)
        return Copy(ended.query, lambda: began.elapsed_time(ended) / 1e3)

    def _has_progressed(self) -> bool:
        if self._comm is None:
            raise LinkBroken("nccl: the pair has ended")
        result = ctypes.c_int()
        _call("ncclCommGetAsyncError", self._comm, ctypes.byref(result))
        if result.value not in (_SUCCESS, _IN_PROGRESS):
            raise LinkBroken(f"nccl: {_library().ncclGetErrorString(result.value).decode()}")
        return result.value == _SUCCESS

    def _wait(self, timeout_s: float) -> None:
        """Until the communicator has done what was asked of it last: a launch takes it some 50 us."""
        began = time.monotonic()
        while not self._has_progressed():
            if self._is_closing():
                raise LinkBroken("nccl: the link was closed")
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise LinkBroken("nccl: the other side did not come in time")
            if waited_s < 1e-3:
                time.sleep(0)  # lets other threads have the interpreter
            else:
                nap()
