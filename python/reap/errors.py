"""The errors of reap.

    ReapError                  exit code 1
    ├── UsageError             exit code 2: the call was wrong (an option, a path, a number)
    │   └── MismatchError      two files that do not belong together
    ├── FormatError            a file is not what it claims to be
    ├── CalibrationError       a calibration or evaluation text cannot be used
    ├── UnsupportedModelError  a model that reap understands well enough to refuse
    ├── OutputError            a result could not be written
    ├── EngineError            llama.cpp refused or failed; quotes its log
    ├── NativeModuleMissing    this step needs the compiled module
    ├── MissingExtraError      this step needs an optional dependency
    └── Interrupted            exit code 130: stopped by the user; says what was kept

Each message is one sentence that names the file, the thing, what was expected and what was found.
This module imports nothing of reap's.
"""

from __future__ import annotations


class ReapError(Exception):
    """Base of everything reap raises on purpose."""

    exit_code: int = 1


class ReapWarning(UserWarning):
    """Something a user should know that does not stop the work."""


class UsageError(ReapError):
    """The call was wrong: an option, a path or a number that can never work."""

    exit_code = 2


class MismatchError(UsageError):
    """Files that do not belong together: a profile of another model, a plan with other layers."""


class FormatError(ReapError):
    """A file is damaged or is not of the format it should have."""


class CalibrationError(ReapError):
    """A calibration or evaluation text cannot be used as it is."""


class UnsupportedModelError(ReapError):
    """A model that cannot be profiled or pruned, and why."""


class OutputError(ReapError):
    """A result could not be written; nothing half-written was left."""


class EngineError(ReapError):
    """llama.cpp refused or failed. The message quotes the end of its log."""


class NativeModuleMissing(ReapError):
    """The compiled half of reap is absent; the message says how to build it."""


class MissingExtraError(ReapError):
    """An optional dependency is absent; the message says what to install."""


class Interrupted(ReapError):
    """Stopped by the user. The message says what was kept and how to go on."""

    exit_code = 130
    result: object = None
    """What there is so far, where that can be used: of `sweep` the table."""
