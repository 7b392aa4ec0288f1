"""Regular files, opened so that nothing else passes for one, and mapped."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from reap.errors import FormatError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


class RegularFile:
    """An open file whose bytes can be copied. Use it as a context manager.

    path: as it was given. size: bytes, when it was opened.
    """

    path: Path
    size: int

    def __init__(self, path: Path, fd: int) -> None:
        """Takes over `fd`, an open regular file. Use `open`."""
        self.path, self._fd = path, fd
        self.size = os.fstat(fd).st_size

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open `path`. Raises UsageError if it is not a readable regular file; a pipe is refused without waiting for
        its writer."""
        where = Path(path)
        return cls(where, open_regular(where))

    def fileno(self) -> int:
        """The descriptor, for copies that stay in the kernel."""
        return self._fd

    def read_range(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` at `offset` through `pread`, which costs no resident pages.

        Raises FormatError if the file ends before.
        """
        parts = []
        while n_bytes > 0:
            part = os.pread(self._fd, n_bytes, offset)
            if not part:
                raise FormatError(f"{self.path}: ends at byte {offset:,}, but was longer when it was opened")
            parts.append(part)
            offset, n_bytes = offset + len(part), n_bytes - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the descriptor. Calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def open_regular(path: Path) -> int:
    """A descriptor of a regular file. A pipe is refused without waiting for its writer."""
    try:
        _check_regular(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be opened: {_reason(error)}") from None
    try:
        _check_regular(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, mode: int) -> None:
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ]
    for is_kind, kind in kinds:
        if is_kind(mode):
            raise UsageError(f"{path}: is {kind}, expected a GGUF file")


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
