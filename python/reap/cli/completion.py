"""Values that the shell completes: words that an option may have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Completion = Callable[[str], list[str]]

#: Where a chat template comes from, where it is not a file.
TEMPLATES = ("none", "auto")
MASKS = ("all", "response")
VERIFY = ("fast", "full", "none")
BLENDS = ("sum", "maxmin")
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def values_of(*words: str) -> Completion:
    """Completes one of these words; of a list with commas, its last item."""
    return _completing(lambda: words)


def metrics() -> Completion:
    """Completes the names of scores."""

    def names() -> Sequence[str]:
        from reap.scores.profile import METRICS

        return tuple(METRICS)

    return _completing(names)


def file_types() -> Completion:
    """Completes what a model may be quantised to."""

    def names() -> Sequence[str]:
        from reap.engine import native
        from reap.errors import ReapError

        try:
            return tuple(native.load().quantize_types())
        except ReapError:  # without the engine nothing is completed
            return ()

    return _completing(names)


def tensor_types() -> Completion:
    """Completes what a tensor may be quantised to."""

    def names() -> Sequence[str]:
        from reap.engine import native
        from reap.errors import ReapError

        try:
            return tuple(native.load().tensor_types())
        except ReapError:
            return ()

    return _completing(names)


def device_names() -> Completion:
    """Completes the devices of this machine."""

    def names() -> Sequence[str]:
        from reap.engine.devices import devices
        from reap.errors import ReapError

        try:
            return tuple(device.name for device in devices())
        except ReapError:
            return ()

    return _completing(names)


def _completing(words: Callable[[], Sequence[str]]) -> Completion:
    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words() if word.lower().startswith(last.lower())]

    return complete
