"""A model opened in the engine, and its tokenizer."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import numpy as np

from reap.engine import native
from reap.files.paths import PathLike

if TYPE_CHECKING:
    from reap import _core

from reap.engine.devices import check_servers
from reap.engine.options import EngineOptions, engine_fields, usable_cores
from reap.errors import EngineError, FormatError, UnsupportedModelError
from reap.gguf.adapter import check_fits, read_adapter
from reap.gguf.model_info import engine_refusal
from reap.gguf.reader import GGUFModel, first_file


def open_session(
    path: PathLike,
    options: EngineOptions,
    *,
    n_sequences: int = 1,
    cache_size: int = 0,
    n_bytes: int | None = None,
    head_on_host: bool = False,
    prediction_layer: int | None = None,
) -> _core.Session:
    """Load a model into the engine; of a split one, any of its files.

    n_sequences: how many may share a batch, fewer where the model does not allow it. cache_size: the tokens that all of
    them together have room for; at least a window and a batch. n_bytes: of the model's files
    (None: of `path`). head_on_host: leave the output head out of the devices, for a session that never reaches it.
    prediction_layer: the multi-token-prediction block whose experts are profiled as well, run in a context of its own.

    Raises EngineError with the end of the engine's log, UsageError for an option that cannot work,
    UnsupportedModelError for a model with types of tensors that only another engine runs, MismatchError for an adapter
    of another model, NativeModuleMissing.
    """
    _check_types(path)
    core = native.load()
    settings = core.SessionOptions()
    settings.model_path = os.fspath(first_file(path))
    settings.model_bytes = n_bytes if n_bytes is not None else os.stat(path).st_size
    settings.n_sequences = n_sequences
    settings.cache_size = cache_size
    for field in engine_fields():
        value = getattr(options, field.name)
        if value is not None:  # otherwise the engine's own default
            setattr(settings, field.setting, value)
    settings.threads = options.threads or usable_cores()
    settings.head_on_host = head_on_host
    settings.prediction_layer = -1 if prediction_layer is None else prediction_layer
    check_servers(options.rpc)
    if settings.adapters:
        with GGUFModel.open(path) as model:
            for adapter in settings.adapters:
                check_fits(read_adapter(adapter), model)
    try:
        return core.Session(settings)
    except EngineError as error:
        hint = _hint(str(error))
        if hint is None:
            raise
        raise EngineError(f"{error}; {hint}") from None


def _hint(error: str) -> str | None:
    """What helps with an error of the engine's, where that is known."""
    if found := _NO_KEY.search(error):
        return f"--override-kv {found[1]}=TYPE:VALUE (override_kv) gives what the file does not say"
    if found := _NO_ARCHITECTURE.search(error):
        return (
            f"the llama.cpp that reap is built with does not know {found[1]}, a newer one may"
            " (REAP_LLAMA_CPP_SOURCE, docs/building.md); inspect and prune go by the names of tensors alone"
        )
    return None


# llama.cpp's src/llama-model-loader.cpp, for a key that an architecture cannot do without
_NO_ARCHITECTURE = re.compile(r"unknown model architecture: '([^']*)'")
_NO_KEY = re.compile(r"key not found in model: ([A-Za-z0-9_.\-]+)")


def open_vocabulary(path: PathLike) -> SessionTokenizer:
    """A model's tokenizer without the model: in a moment, however large it is. Raises as `open_session`."""
    _check_types(path)
    return SessionTokenizer(native.load().Vocabulary(os.fspath(first_file(path))))


def _check_types(path: PathLike) -> None:
    """The engine's own word for a type that it does not know is "invalid ggml type"; of a file that is not sound, or
    has text in another encoding, the engine itself says what it makes of it."""
    try:
        with GGUFModel.open(path) as model:
            refusal = engine_refusal(model)
    except FormatError:
        return
    if refusal is not None:
        raise UnsupportedModelError(refusal)


class SessionTokenizer:
    """The model's own tokenizer, as `reap.text.windows.Tokenizer` wants it."""

    def __init__(self, session: _core.Session | _core.Vocabulary) -> None:
        self._session = session
        self.n_vocab = session.n_vocab
        self.has_tokenizer = session.has_tokenizer
        self.add_bos = session.add_bos
        self.bos: int | None = session.bos if session.bos >= 0 else None
        self.eos: int | None = session.eos if session.eos >= 0 else None
        self.chat_template = session.chat_template

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = np.asarray(self._session.tokenize(text.encode("utf-8"), add_special, parse_special)).tolist()
        return ids

    def token_text(self, token: int) -> bytes:
        """The bytes of a token, special tokens included."""
        return self._session.token_text(token)
