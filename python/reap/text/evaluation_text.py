"""Held-out text -> windows of token ids, by llama-perplexity's rule, each domain apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reap.errors import CalibrationError, UsageError
from reap.files.paths import PathLike
from reap.files.recognise import unreadable_text
from reap.text.formats import TEXT, open_data
from reap.text.sources import files_at
from reap.text.streams import BLOCK, COMPRESSED_SUFFIXES, ByteStream
from reap.text.windows import Calibration, Tokenizer

Text = PathLike | Sequence[PathLike]


@dataclass(frozen=True)
class EvaluationText:
    """Whole windows of a text."""

    files: tuple[str, ...]
    """Paths that it was read from."""
    ctx_size: int
    """Tokens of a window."""
    windows: tuple[NDArray[np.int32], ...]
    """Each int32 [ctx_size]."""
    domain_of: tuple[str | None, ...]
    """Of each window; None: the text names none."""
    dropped_tokens: int
    """Tokens of the text that are in no window."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the order in which they appear."""
        return tuple(dict.fromkeys(domain for domain in self.domain_of if domain is not None))

    @property
    def first_scored(self) -> int:
        """The position whose prediction is the first to count; the last is ctx_size - 2."""
        return self.ctx_size // 2

    @property
    def n_scored(self) -> int:
        """Tokens scored in each window."""
        return self.ctx_size - 1 - self.first_scored

    def in_domain(self, domain: str) -> NDArray[np.bool_]:
        """bool [n_windows]: which of the windows are of that domain."""
        return np.array([name == domain for name in self.domain_of])

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each file, by its name."""
        digests = {}
        for path in self.files:
            with ByteStream(path) as stream:
                digests[path] = stream.finish()
        return digests

    def thinned(self, n_windows: int) -> EvaluationText:
        """About `n_windows` of the windows, spread evenly over each domain; at least one of every domain."""
        total = len(self.windows)
        chosen: list[int] = []
        for domain in dict.fromkeys(self.domain_of):
            members = [index for index, name in enumerate(self.domain_of) if name == domain]
            n = min(len(members), max(1, round(n_windows * len(members) / total)))
            chosen += [members[index * len(members) // n] for index in range(n)]
        windows = tuple(self.windows[index] for index in chosen)
        dropped = self.dropped_tokens + (total - len(windows)) * self.ctx_size
        return replace(
            self, windows=windows, domain_of=tuple(self.domain_of[index] for index in chosen), dropped_tokens=dropped
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the windows: equal where two models are asked the same."""
        digest = hashlib.sha256(repr((self.ctx_size, self.domain_of)).encode())
        for window in self.windows:
            digest.update(window.tobytes())
        return digest.hexdigest()


def read_evaluation_text(
    text: Text, tokenizer: Tokenizer, ctx_size: int, max_windows: int | None = None
) -> EvaluationText:
    """Cut one file or several into windows.

    A file of rows (JSON, CSV, Parquet, compressed or not) holds samples as a calibration file does; each is tokenised
    on its own, and those of one domain are laid end to end. Any other file is text, tokenised whole; special tokens in
    it are not parsed. Of several files each is a domain, named as the file without its suffixes, except for lines that
    name their own; the files of one folder are one domain.
    Every domain is cut into whole windows; the first token of each is replaced by BOS where the model adds one; the end
    that is shorter than a window is dropped, and so is what follows the first `max_windows` windows of a domain.

    Raises UsageError for a file that cannot be read, CalibrationError for one that cannot be used, or a domain shorter
    than a window.
    """
    files, given = text_files(text), text_paths(text)
    streams: dict[str | None, list[int]] = {}
    for path in given:
        own_domain = _name_of(path) if len(given) > 1 else None
        for file in files_at(path):
            for domain, tokens in _read_file(file, tokenizer):
                streams.setdefault(domain if domain is not None else own_domain, []).extend(tokens)
    windows: list[NDArray[np.int32]] = []
    domain_of: list[str | None] = []
    for domain, tokens in streams.items():
        if len(tokens) < ctx_size:
            what = files[0] if domain is None else f'{", ".join(files)}: the domain "{domain}"'
            joint = ": has" if domain is None else " has"
            raise CalibrationError(f"{what}{joint} {len(tokens)} tokens, expected at least one window of {ctx_size}")
        cut = list(islice(cut_windows(tokens, ctx_size, tokenizer), max_windows))
        windows += cut
        domain_of += [domain] * len(cut)
    dropped = sum(len(tokens) for tokens in streams.values()) - len(windows) * ctx_size
    return EvaluationText(tuple(files), ctx_size, tuple(windows), tuple(domain_of), dropped)


def text_files(text: Text) -> list[str]:
    """The files of a text, each of which can be opened: before a model is loaded for nothing. Raises UsageError."""
    files = [file for path in text_paths(text) for file in files_at(path)]
    if not files:
        raise UsageError("there is no text to evaluate on")
    for path in files:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({unreadable_text(path, error, data=True)})") from error
    return files


def text_paths(text: Text) -> list[str]:
    """What a text is made of, as it was given: files and folders."""
    return [os.fspath(text)] if isinstance(text, str | os.PathLike) else [os.fspath(path) for path in text]


def _name_of(path: str) -> str:
    """What a file's or a folder's domain is called: its name without suffixes."""
    stem, suffix = os.path.splitext(Path(path).name)
    return os.path.splitext(stem)[0] if suffix.lower() in COMPRESSED_SUFFIXES else stem


def _read_file(path: str, tokenizer: Tokenizer) -> Iterator[tuple[str | None, list[int]]]:
    """(domain or None, token ids) of each sample of a file, or of the whole text."""
    data = open_data(path)
    with data.stream as stream:
        content = _decode(stream, path) if data.format == TEXT else None
    if content is None:
        whole_samples = 1 << 30
        for window in Calibration(path, ctx_size=whole_samples, parse_special=False).windows(tokenizer):
            yield window.domain, window.tokens.tolist()
        return
    if not tokenizer.has_tokenizer:
        raise CalibrationError(
            f'{path}: the model has no tokenizer, so the text has to be JSON Lines that give "tokens"'
        )
    yield None, tokenizer.tokenize(content, add_special=True, parse_special=False)


def _decode(stream: ByteStream, path: str) -> str:
    parts = []
    while block := stream.read(BLOCK):
        parts.append(block)
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def cut_windows(tokens: Sequence[int], ctx_size: int, tokenizer: Tokenizer) -> Iterator[NDArray[np.int32]]:
    """Whole windows int32 [ctx_size], each beginning with BOS where the model adds one."""
    for start in range(0, len(tokens) - ctx_size + 1, ctx_size):
        window = np.asarray(tokens[start : start + ctx_size], dtype=np.int32)
        if tokenizer.add_bos and tokenizer.bos is not None:
            window[0] = tokenizer.bos
        yield window
