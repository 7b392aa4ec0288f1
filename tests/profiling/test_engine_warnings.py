"""profile() says what the engine warns of, keeps it and shows it; no default context is beyond training."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import reap
from reap.errors import ReapWarning

DATA = Path(reap.__file__).parent / "data"
MODEL = next(DATA.glob("reap-demo-*.gguf"))
TEXT = [{"text": "one two three four five six seven eight"}]


def test_the_default_context_of_a_profile_is_not_beyond_training() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is anything said of tensors that reap itself keeps on the host
        found = reap.profile(MODEL, TEXT, threads=1)
    assert found.engine["options"]["ctx_size"] == reap.inspect(MODEL).context_length == 512
    assert "warnings" not in found.engine
    assert reap.preview(MODEL, [{"text": "many words " * 600}]).ctx_size == 512


def test_what_the_engine_warns_of_is_said_kept_and_on_the_page(tmp_path: Path) -> None:
    with pytest.warns(ReapWarning, match="longer than the 512") as caught:
        found = reap.profile(MODEL, TEXT, threads=1, ctx_size=1024)
    said = [str(one.message) for one in caught]
    assert found.engine["warnings"] == said
    assert len(said) == len(set(said)) == 1
    saved = found.save(tmp_path / "p.json")
    page = tmp_path / "page.html"
    reap.report(saved, page)
    assert page.read_text(encoding="utf-8").count("longer than the 512") == 1
