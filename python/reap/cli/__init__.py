"""The command line: one command is one call of the library, and printing. The only place that prints or exits."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from reap.errors import ReapError, ReapWarning
from reap.profiling.interrupts import endings_as_interrupts

INTERRUPTED = 130
TRACEBACK_VARIABLE = "REAP_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 the work failed, 2 the call was wrong, 130 interrupted."""
    from typer.main import get_command

    from reap.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    try:
        with warnings.catch_warnings(), endings_as_interrupts():
            warnings.simplefilter("always", ReapWarning)
            warnings.showwarning = _show_warning
            get_command(app).main(args=None if arguments is None else list(arguments), prog_name="reap")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except ReapError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:
        return _fail(_unexpected(error), 1)
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(sentence: str, code: int) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> str:
    detail = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    if isinstance(error, OSError):
        return detail or kind
    return f"{kind}: {detail} (this should not happen; {TRACEBACK_VARIABLE}=1 shows where it did)"
