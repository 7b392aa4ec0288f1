"""A held-out text in two parts that share no window: one to choose on, one to judge the choice on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from reap.engine.session import open_vocabulary
from reap.errors import CalibrationError
from reap.files.atomic import write_whole
from reap.files.paths import PathLike
from reap.text.evaluation_text import EvaluationText, Text, read_evaluation_text


def divide_text(
    model: PathLike, text: Text, ctx_size: int, max_tokens: int | None
) -> tuple[EvaluationText, EvaluationText]:
    """A text's windows as the engine gets them: of each domain every other one to choose on, the others to judge on.

    Neighbours go to different parts, so that both have a share of every stretch of a text.

    Args:
        model: whose tokenizer reads the text.
        text: as of `read_evaluation_text`.
        ctx_size: tokens of a window.
        max_tokens: about so many tokens of the text, spread over it; None: all.

    Raises CalibrationError where a domain has fewer than two windows.
    """
    whole = read_evaluation_text(text, open_vocabulary(model), ctx_size)
    if max_tokens is not None:
        whole = whole.thinned(max(2, max_tokens // ctx_size))
    for domain in dict.fromkeys(whole.domain_of):
        n_windows = whole.domain_of.count(domain)
        if n_windows < 2:
            what = ", ".join(whole.files) if domain is None else f'{", ".join(whole.files)}: the domain "{domain}"'
            raise CalibrationError(
                f"{what}: has {n_windows} window of {ctx_size} tokens, expected two or more: one to choose a criterion"
                " on, one to judge it on"
            )
    return _part(whole, 0), _part(whole, 1)


def _part(whole: EvaluationText, which: int) -> EvaluationText:
    chosen = []
    for domain in dict.fromkeys(whole.domain_of):
        members = [index for index, name in enumerate(whole.domain_of) if name == domain]
        chosen += members[which::2]
    windows = tuple(whole.windows[index] for index in chosen)
    return EvaluationText(whole.files, whole.ctx_size, windows, tuple(whole.domain_of[index] for index in chosen), 0)


def write_part(part: EvaluationText, path: Path) -> None:
    """JSON Lines, a window a line: `{"tokens": [...], "domain": "code"}`, which every command reads as that text."""
    write_whole(path, "".join(_lines(part)).encode(), force=True)


def _lines(part: EvaluationText) -> Iterator[str]:
    for window, domain in zip(part.windows, part.domain_of, strict=True):
        line = {"tokens": window.tolist()} | ({} if domain is None else {"domain": domain})
        yield json.dumps(line) + "\n"
