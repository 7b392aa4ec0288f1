"""Moves byte ranges from file to file inside the kernel where it can, without displacing what others have in the page
cache.

Tried on Linux 6.18 with ext4: `copy_file_range` and `sendfile` go through a pipe of 64 KiB there and reach 0.9 of
`cp`'s rate, `splice` through a pipe of 1 MiB 1.4. Blocks are rarely shared in any case, since experts do not begin
where blocks do. Only a file system whose server copies for us gains by `copy_file_range`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

BUFFER_BYTES = 1 << 20
# one kernel call copies at most this much, so that Ctrl-C and progress are never far away
KERNEL_CHUNK_BYTES = 64 << 20
PIPE_BYTES = 1 << 20
# what a kernel or a file system answers when it does not offer a way of copying
_NOT_OFFERED = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}
)
_COPYING_SERVERS = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph"})
_MOUNTS = "/proc/self/mountinfo"

_Way = Callable[[int, int, int, int], int]


def write_all(target: int, chunk: bytes) -> None:
    """Every byte of `chunk`."""
    view = memoryview(chunk)
    while view:
        view = view[os.write(target, view) :]


class Copier:
    """Appends ranges to a file, by the fastest way that kernel and file systems offer. Use it as a context manager."""

    def __init__(self, target: int) -> None:
        """target: a descriptor to write to; it stays open."""
        self.target = target
        self._pipe: tuple[int, int] | None = None
        self.ways: list[_Way] = [self._by_splice, _by_copy_file_range, _by_sendfile, _by_buffer]
        if not hasattr(os, "copy_file_range"):
            self.ways.remove(_by_copy_file_range)
        elif file_system(target) in _COPYING_SERVERS:
            self.ways.sort(key=lambda way: way is not _by_copy_file_range)
        if not hasattr(os, "splice"):
            self.ways.remove(self._by_splice)

    def copy(self, source: int, offset: int, n_bytes: int) -> Iterator[int]:
        """Copy a range; yields the bytes of each step, and a 0 at the end where the source is too short."""
        end = offset + n_bytes
        while offset < end:
            copied = self._step(source, offset, end - offset)
            yield copied
            if copied == 0:
                return
            offset += copied

    def _step(self, source: int, offset: int, n_bytes: int) -> int:
        while len(self.ways) > 1:
            try:
                copied = self.ways[0](source, self.target, offset, n_bytes)
                if copied:
                    return copied
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
            # not offered, or nothing copied although there is more: some file systems lie about both
            del self.ways[0]
        return self.ways[0](source, self.target, offset, n_bytes)

    def _by_splice(self, source: int, target: int, offset: int, n_bytes: int) -> int:
        if self._pipe is None:
            self._pipe = _large_pipe()
        there = os.splice(source, self._pipe[1], min(n_bytes, PIPE_BYTES), offset_src=offset)
        written = 0
        try:
            while written < there:
                written += os.splice(self._pipe[0], target, there - written)
        except OSError:
            self.close()  # with what is left in the pipe
            if written == 0:
                raise
        return written

    def close(self) -> None:
        """Close the pipe. Calling it again does nothing."""
        ends, self._pipe = self._pipe or (), None
        for end in ends:
            os.close(end)

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _by_copy_file_range(source: int, target: int, offset: int, n_bytes: int) -> int:
    return os.copy_file_range(source, target, min(n_bytes, KERNEL_CHUNK_BYTES), offset_src=offset)


def _by_sendfile(source: int, target: int, offset: int, n_bytes: int) -> int:
    return os.sendfile(target, source, offset, min(n_bytes, KERNEL_CHUNK_BYTES))


def _by_buffer(source: int, target: int, offset: int, n_bytes: int) -> int:
    chunk = os.pread(source, min(n_bytes, BUFFER_BYTES), offset)
    write_all(target, chunk)
    return len(chunk)


def _large_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    with suppress(
        OSError, AttributeError
    ):  # a user with many pipes may have only small ones; 3.10 has no name for the request
        fcntl.fcntl(writing, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_BYTES)
    return reading, writing


def file_system(fd: int) -> str | None:
    """The type of the file system that a descriptor is on, as Linux names it; None where that is not known."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(_MOUNTS, encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                if before.split()[2:3] == [wanted]:
                    return after.split()[0]
    except (OSError, IndexError):
        return None
    return None


# ---- the page cache, which belongs to others as well


def is_cached(fd: int, offset: int) -> bool:
    """Whether the byte at `offset` is in memory already; True where the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True


def prefetch(fd: int, offset: int, n_bytes: int) -> None:
    """Let the system begin to read a range."""
    _advise(fd, offset, n_bytes, "POSIX_FADV_WILLNEED")


def drop_cache(fd: int, offset: int, n_bytes: int) -> None:
    """Let go of the pages of a range. Of dirty ones it drops none, but the disk begins to write them (Linux,
    mm/fadvise.c)."""
    _advise(fd, offset, n_bytes, "POSIX_FADV_DONTNEED")


def _advise(fd: int, offset: int, n_bytes: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is advice
            os.posix_fadvise(fd, offset, n_bytes, getattr(os, advice))


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
