"""SIGTERM and SIGHUP answered like Ctrl-C, and the moments in which none of them may come between."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def endings_as_interrupts() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, as Ctrl-C does.

    A signal that the program handles or ignores itself is left as it is. In another thread, which may set no handler,
    nothing changes.
    """
    with _handlers({number: _interrupt for number in _ENDINGS if signal.getsignal(number) == signal.SIG_DFL}):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While it lasts, Ctrl-C, SIGTERM and SIGHUP are ignored: for a short step that must not be half done."""
    with _handlers({number: signal.SIG_IGN for number in (signal.SIGINT, *_ENDINGS)}):
        yield


@contextmanager
def _handlers(wanted: dict[int, Any]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in wanted.items():
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
