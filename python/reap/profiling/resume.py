"""Resume files: what a run has measured so far, and of what, so that a later run goes on to the same result."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, MismatchError, OutputError, ReapWarning, UsageError
from reap.files.atomic import check_outputs, write_whole
from reap.files.paths import PathLike
from reap.files.recognise import RESUME_FILE, what_is
from reap.files.strict_json import Node, json_bytes, read_json
from reap.files.version import version
from reap.scores.profile import Profile
from reap.scores.records import SUMS
from reap.scores.replicates import PARTS
from reap.text.windows import Calibration

FORMAT = "reap.resume"
VERSION = 2
_OLDER_FORMAT = "reap.checkpoint"
# saving may take at most about this share of the time
_SAVING_SHARE = 0.05
SECONDS = 30.0

# a large model's sums in many domains, in 16 parts each
_MAX_BYTES = 4 << 30

Arrays = Mapping[str, NDArray[Any]]
#: (domain, None for lines without one; part of the calibration)
Key = tuple[str | None, int]


@dataclass
class State:
    """Where a run is."""

    units: int = 0
    """Samples (or windows of a text file) that are done, those that failed included; skipped ones are not units."""
    consumed: str = ""
    """`Window.consumed` of the last of these units, in hexadecimal digits; "" where there is none."""
    keys: list[Key] = field(default_factory=list)
    """Group -> (domain, None for lines without one; part of the calibration)."""
    groups: list[Arrays] = field(default_factory=list)
    """The sums of each group, as `Session.sums` gives them."""
    failed: dict[int, str] = field(default_factory=dict)
    """Unit -> "where: why", of the units that the engine failed on."""
    now: str = ""
    """`Calibration.now` of the run, in ISO 8601: what chat templates were told; "" where it is not known."""


def identify(model: Mapping[str, Any], options: Mapping[str, Any], source: Calibration) -> dict[str, Any]:
    """What makes two runs the same run, apart from the calibration, which is known as it is consumed."""
    texts = source.options()
    for mended in ("columns", "skip_bad_lines"):  # what a line that could not be read may ask for
        del texts[mended]
    return {"model": model, "options": {**options, **texts}, "reap": version()}


def beside(output: PathLike) -> Path | None:
    """Where the state of a run is kept that is to write `output`; None where that is a device or a pipe."""
    path = Path(output)
    return path.with_name(f"{path.name}.resume") if path.is_file() or not path.exists() else None


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """A resume file's contents with a digest of them: a figure that was changed would change the result unseen."""
    return {**document, "sha256": _digest(document)}


def check_seal(node: Node) -> None:
    """FormatError where a resume file is not as it was written."""
    document = dict(node.members())
    if document.pop("sha256", None) != _digest(document):
        node.fail("is damaged: it is not what a run wrote; remove it to begin anew")


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def in_the_way(path: Path) -> UsageError:
    """What is said of a file that is where a run was to keep its state, and was not asked to go on from."""
    found = what_is(path)
    if found not in (RESUME_FILE, None, "an empty file"):
        return UsageError(f"{path}: is {found}, where a resume file would be written; choose another name for that")
    return UsageError(
        f"{path}: a resume file is there already; --resume (resume=True) goes on from it, removing it begins anew"
    )


class ResumeFile:
    """One file, written whole or not at all, at most every `seconds` (less often where writing it takes long).

    `state` is where the run begins: what the file holds with `resume`, else nothing.
    """

    def __init__(
        self,
        path: PathLike,
        identity: Mapping[str, Any],
        *,
        shape: tuple[int, int],
        resume: bool,
        seconds: float = SECONDS,
    ) -> None:
        """Look at the file, and read it with `resume`.

        Args:
            path: the file; it need not exist.
            identity: what the run is, as JSON types: its model, its options.
            shape: MoE layers, and experts of each.
            resume: go on from the file where there is one.
            seconds: between two savings.

        Raises:
            UsageError: a file is there and `resume` is off.
            MismatchError: the file is of another run.
            FormatError: it is damaged, or of another version of reap.
        """
        self.path = Path(path)
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples are lists once they were in a file
        self._shape = shape
        self._seconds = seconds
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._has_warned = False
        check_outputs([self.path], force=True)  # or it would be found out when there is something to keep
        if self.path.exists() and not resume:
            raise in_the_way(self.path)
        self.state = self._load() if self.path.exists() else State()

    def _load(self) -> State:
        node = read_json(self.path, what="resume file", max_bytes=_MAX_BYTES)
        found = node["format"].string()
        if found == _OLDER_FORMAT:
            raise FormatError(
                f"{self.path}: is a resume file of an older release of reap, which counted samples in another way;"
                " remove it to begin anew"
            )
        if found == FORMAT and 0 < node["version"].integer() < VERSION:
            raise FormatError(
                f"{self.path}: is a resume file of an older release of reap, which measured less; remove it to begin"
                " anew"
            )
        if found != FORMAT or node["version"].integer() != VERSION:
            raise FormatError(f"{self.path}: is not a resume file of this version of reap")
        _compare(self.path, node["identity"].members(), self._identity)
        state = _read_state(node, self._shape)
        check_seal(node)
        return state

    def is_due(self) -> bool:
        """Whether enough time has passed since the last saving."""
        return time.monotonic() - self._saved_at >= max(self._seconds, self._cost / _SAVING_SHARE)

    def save_or_warn(self, state: State) -> None:
        """Write the state; where that fails the run goes on, with a ReapWarning for the first time."""
        try:
            self.save(state)
        except OutputError as error:
            self._saved_at = time.monotonic()
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{error}; the run goes on without it", ReapWarning, stacklevel=2)

    def remove(self) -> None:
        """A run is over of which nothing is left to keep."""
        self.path.unlink(missing_ok=True)

    def save(self, state: State) -> None:
        """Write the state. Raises OutputError where that fails; the file before it is kept then."""
        started = time.monotonic()
        document = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self._identity,
            "units": state.units,
            "consumed": state.consumed,
            "now": state.now,
            "failed": {str(unit): reason for unit, reason in state.failed.items()},
            "groups": [
                {"domain": domain, "part": part, **{name: _pack(values) for name, values in group.items()}}
                for (domain, part), group in zip(state.keys, state.groups, strict=True)
            ],
        }
        write_whole(self.path, json_bytes(sealed(document)), force=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started


def _compare(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for part, wanted in expected.items():
        had = found.get(part)
        if had == wanted:
            continue
        if isinstance(wanted, Mapping) and isinstance(had, Mapping):
            name = next(name for name in {**wanted, **had} if wanted.get(name) != had.get(name))
            raise MismatchError(
                f"{path}: is of a run with {part} {name} {had.get(name)!r}, where this one has {wanted.get(name)!r}"
            )
        raise MismatchError(f"{path}: is of another {part} ({had!r}) than this run's ({wanted!r})")


# ---- reading: FormatError for what no run writes


def _read_state(node: Node, shape: tuple[int, int]) -> State:
    units = node["units"].integer()
    consumed = node["consumed"]
    if not re.fullmatch("[0-9a-f]{64}" if units else "", consumed.string()):
        consumed.fail("should be the SHA-256 of what was consumed, in hexadecimal digits")
    entries = [node["groups"].entry(index) for index in range(len(node["groups"].entries()))]
    keys = [_read_key(entry) for entry in entries]
    if len(set(keys)) != len(keys):
        node["groups"].fail("has a part of a domain twice")
    groups = [_read_group(entry, shape) for entry in entries]
    return State(units, consumed.string(), keys, groups, _read_failed(node["failed"], units), _read_now(node))


def _read_key(node: Node) -> Key:
    domain = node["domain"]
    return None if domain.value is None else domain.string(), node["part"].integer(0, PARTS - 1)


def _read_now(node: Node) -> str:
    if "now" not in node.members():
        return ""
    text = node["now"].string()
    try:
        return text and datetime.fromisoformat(text).isoformat()
    except ValueError:
        node["now"].fail("should be a date and a time")


def _read_failed(node: Node, units: int) -> dict[int, str]:
    failed = {}
    for key, reason in node.items():
        if not re.fullmatch("0|[1-9][0-9]{0,17}", key) or int(key) >= units:
            reason.fail(f"is not one of the {units} samples that are done")
        failed[int(key)] = reason.string()
    return failed


def _pack(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).decode()


def _unpack(node: Node, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """The numbers in a string as `_pack` writes it: base64 of 8 bytes each, little-endian."""
    try:
        raw = base64.b64decode(node.string(), validate=True)
    except ValueError:
        node.fail("should be base64")
    if len(raw) != 8 * math.prod(shape):
        node.fail(f"holds {len(raw)} bytes where {8 * math.prod(shape)} were expected")
    values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
    if not np.isfinite(values).all():
        node.fail("has a number that is not finite")
    return values


def _read_group(node: Node, shape: tuple[int, int]) -> Arrays:
    n_layers, n_experts = shape
    arrays: dict[str, Any] = {"total_tokens": _unpack(node["total_tokens"], (n_layers,), np.int64)}
    for name in ("counts", *SUMS):
        arrays[name] = _unpack(node[name], shape, np.int64 if name == "counts" else np.float64)
    try:  # what a profile could not hold must not be found at the end of the run
        Profile.from_sums(layers=range(n_layers), **arrays, model={"n_experts": n_experts})
    except FormatError as error:
        node.fail(f"cannot be the sums of a run: {error}")
    return arrays
