"""Regular files, opened so that nothing else passes for one, and mapped."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from reap.errors import FormatError, UsageError
from reap.files.paths import PathLike
from reap.files.recognise import absent_text, what_is

if TYPE_CHECKING:
    from typing_extensions import Self


class RegularFile:
    """An open file whose bytes can be copied. Use it as a context manager.

    path: as it was given. size: bytes, when it was opened.
    """

    path: Path
    size: int
    #: how an error names what should have been given
    expected: ClassVar[str] = "a regular file"

    def __init__(self, path: Path, fd: int) -> None:
        """Takes over `fd`, an open regular file. Use `open`."""
        self.path, self._fd = path, fd
        self.size = os.fstat(fd).st_size

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Open `path`. Raises UsageError if it is not a readable regular file; a pipe is refused without waiting for
        its writer."""
        where = Path(path)
        return cls(where, open_regular(where, cls.expected))

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


def open_regular(path: Path, expected: str) -> int:
    """A descriptor of a regular file. A pipe is refused without waiting for its writer.

    expected: what an error says should have been given. Raises UsageError.
    """
    try:
        _check_regular(path, os.stat(path).st_mode, expected)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UsageError(f"{path}: {absent_text(path)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be opened: {_reason(error)}") from None
    try:
        _check_regular(path, os.fstat(fd).st_mode, expected)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, mode: int, expected: str) -> None:
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ]
    if stat.S_ISDIR(mode):
        inside = what_is(path)
        raise UsageError(f"{path}: is {inside if inside != 'a folder' else 'a directory'}, expected {expected}")
    for is_kind, kind in kinds:
        if is_kind(mode):
            raise UsageError(f"{path}: is {kind}, expected {expected}")


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
