"""profile() of the Hugging Face half: the same calibration and the same Profile, measured on a transformers model."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.engine.options import PROFILE_CTX_SIZE
from reap.errors import ReapWarning, UnsupportedModelError, UsageError
from reap.files.arguments import divide, shows
from reap.files.atomic import check_distinct, paths_of
from reap.files.paths import PathLike
from reap.files.strict_json import parse_json
from reap.files.version import version
from reap.gguf.router_sketch import RouterSketch, to_record
from reap.hf.dependencies import require_extra
from reap.hf.disk.config import trained_context
from reap.hf.disk.discovery import CONFIG, read_text
from reap.hf.disk.info import (
    Structure,
    identity_parts,
    model_type_of,
    read_vocabulary,
    sketch_folder,
    structure_fingerprint,
    vocabulary_hash,
)
from reap.hf.memory.loading import LoadArguments, LoadOptions, check_folder, load_model, load_tokenizer
from reap.hf.memory.tokenizer import HFTokenizer
from reap.profiling.record import make_profile
from reap.profiling.resume import SECONDS, ResumeFile, identify
from reap.profiling.run import SHARED_SEQUENCES, measure
from reap.profiling.until import Until, UntilArguments, check_until
from reap.progress import ProgressCallback
from reap.scores.profile import Profile
from reap.text.sources import Source
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from reap.hf.memory.modules import MoELayer
    from reap.hf.memory.sessions import ModelSession
    from reap.hf.memory.streaming import LayerStore


class Arguments(LoadArguments, TextArguments, UntilArguments, total=False):
    """How a checkpoint is loaded (`LoadOptions`), the text is read (`Calibration`), and when it is enough
    (`Until.of`)."""


@shows((TextArguments, Calibration), (LoadArguments, LoadOptions), (UntilArguments, Until.of))
def profile(
    model: Any,
    calibration: Source,
    *,
    tokenizer: Any = None,
    ctx_size: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    checkpoint: PathLike | None = None,
    resume: bool = False,
    checkpoint_seconds: float = SECONDS,
    progress: ProgressCallback | None = None,
    **options: Unpack[Arguments],
) -> Profile:
    """Measure what each expert of a transformers model contributes on `calibration`, as `reap.profile` does for a GGUF
    file.

    Layers carry the checkpoint's numbers, which are the GGUF file's block indices.

    Args:
        model: the folder of a checkpoint, or a transformers model in memory, which stays as it is (its own device,
            types and implementation of experts; the loading options are then refused).
        calibration: as `reap.profile` takes it; so are `checkpoint`, `resume`, `checkpoint_seconds`.
        ctx_size: tokens of one window; 2,048 by default, or what the model was trained for where that is less. More
            than that is a ReapWarning, and in `profile.engine["warnings"]`.
        tokenizer: in place of the checkpoint's.
        batch_size: tokens of one pass, `ctx_size` by default; short samples share it, and what pads them reaches
            neither an expert nor the sums.
        threads: of the processor.
        progress: told after each batch how far the run is.
        options: those of the text (`Calibration`) and of loading (`LoadOptions`); until, keep and metric as
            `reap.profile` takes them.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed, or what an option needs.
        UsageError: an option, a folder that is not a checkpoint (one of pickles among them), a resume file that is in
            the way or of another run.
        UnsupportedModelError: a dense model, or one whose experts are used in a way that cannot be measured.
        CalibrationError, Interrupted: as `reap.profile`. EngineError: transformers failed.
    """
    require_extra("reap.hf.profile")
    for_loading, for_text, for_until = divide("profile", options, LoadArguments, TextArguments, UntilArguments)
    check_until(**for_until)
    load = LoadOptions(**for_loading)
    trained = _trained_context(model)
    if ctx_size is None:
        ctx_size = min(PROFILE_CTX_SIZE, trained or PROFILE_CTX_SIZE)
    source = Calibration(calibration, ctx_size=ctx_size, **for_text)
    batch_size = ctx_size if batch_size is None else batch_size
    if type(batch_size) is not int or batch_size < ctx_size:
        raise UsageError(f"batch_size is {batch_size!r}, expected a whole number of at least ctx_size, {ctx_size}")
    if resume and checkpoint is None:
        raise UsageError("resume needs a checkpoint to go on from")
    if checkpoint is not None:
        check_distinct([checkpoint], (*paths_of(model), *source.inputs))
    load.check()
    source.check()  # before a model is loaded for nothing
    from_where = _from_folder if isinstance(model, str | os.PathLike) else _in_memory
    subject = from_where(model, load, tokenizer)
    keeper = None
    if checkpoint is not None:
        shape = (len(subject.layers), subject.layers[0].n_experts)
        sizes = {"ctx_size": ctx_size, "batch_size": batch_size}
        identity = identify(subject.identity(), {**load.record(), **sizes}, source)
        keeper = ResumeFile(checkpoint, identity, shape=shape, resume=resume, seconds=checkpoint_seconds)
    first = subject.layers[0]
    until = Until.of({"n_experts": first.n_experts, "n_groups": first.n_group}, **for_until)
    session = _open_session(subject, batch_size)
    said = _beyond(ctx_size, trained)
    for warning in said:
        warnings.warn(warning, ReapWarning, stacklevel=2)
    with _threads(threads), _evaluating(subject.model):
        result = measure(session, subject.tokenizer, source, keeper, progress, until)
    layers = [layer.index for layer in subject.layers]
    record, engine = subject.record(session.n_experts_used), subject.engine(load)
    if said:
        engine["warnings"] = said
    return make_profile(result, source, layers=layers, model=record, engine=engine, until=until)


def _trained_context(model: Any) -> int:
    """Of a folder or a model in memory; 0 where it does not say."""
    if isinstance(model, str | os.PathLike):
        folder = Path(model)
        check_folder(folder)
        config = parse_json(read_text(folder / CONFIG), str(folder / CONFIG), allow_constants=True)
    else:
        own: Any = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else None
    return trained_context(config) if isinstance(config, dict) else 0


def _beyond(ctx_size: int, trained: int) -> list[str]:
    """A sentence where windows are longer than the model was trained for."""
    return (
        [f"ctx_size is {ctx_size:,}, but the model was trained for {trained:,} tokens"]
        if 0 < trained < ctx_size
        else []
    )


class _Subject:
    """What is measured: a model, its layers and its tokenizer, and what is known of them."""

    def __init__(
        self, model: Any, name: str, tokenizer: Any, folder: Path | None, store: LayerStore | None = None
    ) -> None:
        from reap.hf.memory.modules import find_moe_layers, require_one_count, text_config

        self.model, self.name, self.folder, self.store = model, name, folder, store
        # once quantised, experts no longer have the shapes by which they are found
        self.layers: list[MoELayer] = store.moe_layers if store else list(find_moe_layers(model).values())
        require_one_count(self.layers)
        self.config = text_config(getattr(model, "config", None))
        self.tokenizer = HFTokenizer(tokenizer, _vocabulary(model, self.config))

    def identity(self) -> dict[str, Any]:
        """What makes two models the same for a run that goes on."""
        return {
            "shapes": self._hash_shapes(),
            "files": self._hash_files(),
            "implementation": self._implementation(),
        }

    def record(self, n_experts_used: int) -> dict[str, Any]:
        """The profile's record of the model."""
        first = self.layers[0]
        counts = {
            "n_layers": int(getattr(self.config, "num_hidden_layers", 0) or 0),
            "n_experts": first.n_experts,
            "n_experts_used": n_experts_used,
            "n_groups": first.n_group,
            "n_groups_used": first.topk_group,
        }
        n_embd, vocab_size = (int(getattr(self.config, name, 0) or 0) for name in ("hidden_size", "vocab_size"))
        structure = Structure(
            moe_layers=[layer.index for layer in self.layers], **counts, n_embd=n_embd, vocab_size=vocab_size
        )
        identity = identity_parts(self._model_type(), structure, self._vocabulary_hash())
        return {
            "name": self.name,
            "architecture": str(getattr(self.config, "model_type", "") or type(self.model).__name__),
            "fingerprint": structure_fingerprint(identity),
            **counts,
            "n_embd": n_embd,
            "identity": identity,
            "routers": to_record(self._sketch_routers()),
        }

    def _model_type(self) -> str:
        if self.folder is not None:
            return model_type_of(json.loads((self.folder / CONFIG).read_bytes()))
        return model_type_of({"model_type": getattr(self.config, "model_type", None) or type(self.model).__name__})

    def _vocabulary_hash(self) -> str | None:
        if self.folder is not None:
            return read_vocabulary(self.folder)
        tokenizer = self.tokenizer.wrapped
        if not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "get_added_vocab"):
            return None
        return vocabulary_hash(tokenizer.get_vocab(), tokenizer.get_added_vocab())

    def _sketch_routers(self) -> RouterSketch:
        """Of the files where there are some: in memory, their numbers may be rounded or not there at all."""
        from reap.hf.memory.modules import sketch_routers

        if self.folder is not None:
            with suppress(UnsupportedModelError):
                return sketch_folder(self.folder)
        return sketch_routers(self.layers)

    def engine(self, options: LoadOptions) -> dict[str, Any]:
        """The profile's record of what ran it."""
        import torch
        import transformers

        weights = {
            "nf4" if tensor.dtype == torch.uint8 else str(tensor.dtype).removeprefix("torch.")
            for tensor in self.model.parameters()
        }
        record = {**options.record(), "weights": sorted(weights), "experts_implementation": self._implementation()}
        return {
            "reap": version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "options": record,
        }

    def _implementation(self) -> str | None:
        return getattr(self.config, "_experts_implementation", None)

    def _hash_shapes(self) -> str:
        shapes = sorted((name, tuple(tensor.shape)) for name, tensor in self.model.named_parameters())
        return hashlib.sha256(repr(shapes).encode()).hexdigest()

    def _hash_files(self) -> str:
        """Of a folder the names, sizes and times of its weights; of a model in memory the routers' values."""
        digest = hashlib.sha256()
        if self.folder is not None:
            files = [
                (path.name, path.stat().st_size, path.stat().st_mtime_ns)
                for path in sorted(self.folder.glob("*.safetensors"))
            ]
            digest.update(repr(files).encode())
        else:
            for layer in self.layers:
                for tensor in layer.router.parameters():
                    digest.update(
                        b"" if tensor.device.type == "meta" else tensor.detach().float().cpu().numpy().tobytes()
                    )
        return digest.hexdigest()


def _from_folder(path: PathLike, options: LoadOptions, tokenizer: Any) -> _Subject:
    folder = Path(path)
    check_folder(folder)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(folder, options)
    name = folder.resolve().name
    if not (options.stream or options.load_in_4bit):
        return _Subject(load_model(folder, options), name, tokenizer, folder)
    from reap.hf.memory.streaming import LayerStore

    store = LayerStore(folder, options)
    if options.load_in_4bit:
        store.load_in_4bit()
    return _Subject(store.model, name, tokenizer, folder, store)


def _in_memory(model: Any, options: LoadOptions, tokenizer: Any) -> _Subject:
    if options != LoadOptions():
        raise UsageError(
            "a model in memory stays as it is: device, dtype, device_map, load_in_4bit, stream and trust_remote_code"
            " are for folders"
        )
    if not hasattr(model, "named_modules"):
        raise UsageError(
            f"the model should be a checkpoint's folder or a transformers model, found {type(model).__name__}"
        )
    origin = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None and origin and Path(origin).is_dir():
        tokenizer = load_tokenizer(Path(origin), options)
    return _Subject(model, Path(origin).name or type(model).__name__, tokenizer, None)


def _open_session(subject: _Subject, batch_size: int) -> ModelSession:
    from reap.hf.memory.sessions import ModelSession

    pad_token = subject.tokenizer.eos or 0
    if subject.store is None or not subject.store.is_streamed:
        return ModelSession(
            subject.model, subject.layers, batch_size=batch_size, n_sequences=SHARED_SEQUENCES, pad_token=pad_token
        )
    from reap.hf.memory.streaming import StreamingSession

    return StreamingSession(subject.store, subject.layers, pass_size=batch_size, pad_token=pad_token)


def _vocabulary(model: Any, config: Any) -> int:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return int(getattr(embedding, "num_embeddings", 0) or getattr(config, "vocab_size", 0))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    if number is not None and (type(number) is not int or number < 1):
        raise UsageError(f"threads is {number!r}, expected a whole number of at least 1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout and noise off while it runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
