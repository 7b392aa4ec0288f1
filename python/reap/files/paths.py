"""The type of a path, as every public function takes it."""

from __future__ import annotations

import os

PathLike = str | os.PathLike[str]
