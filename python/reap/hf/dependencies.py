"""What the Hugging Face half needs beyond reap itself, and the sentence that says so."""

from __future__ import annotations

from importlib.util import find_spec

from reap.errors import MissingExtraError

EXTRA = ("torch", "transformers", "safetensors")


def require_extra(what: str, *names: str) -> None:
    """MissingExtraError where one of the packages `names` (the whole extra by default) is not installed; `what` needs
    them."""
    missing = [name for name in names or EXTRA if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{what} needs {' and '.join(missing)}: pip install 'reap-moe[hf]'")


def require_package(what: str, name: str) -> None:
    """MissingExtraError for a package that only one option needs."""
    if find_spec(name) is None:
        raise MissingExtraError(f"{what} needs {name}: pip install {name}")
