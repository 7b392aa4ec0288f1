"""profile() of the Hugging Face half: the same calibration and the same Profile, measured on a transformers model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.errors import CalibrationError, EngineError, Interrupted, UsageError
from reap.hf.dependencies import require_extra
from reap.hf.disk.info import structure_fingerprint
from reap.hf.memory.loading import LoadOptions, check_folder, load_model, load_tokenizer
from reap.hf.memory.tokenizer import HFTokenizer
from reap.profiling.resume import Checkpoint, State, identify_calibration
from reap.profiling.run import SHARED_SEQUENCES, Run, total
from reap.progress import ProgressCallback
from reap.scores.profile import Profile
from reap.text.calibration import Calibration
from reap.version import version

if TYPE_CHECKING:
    from reap.hf.memory.modules import MoELayer
    from reap.hf.memory.sessions import ModelSession
    from reap.hf.memory.streaming import LayerStore


def profile(
    model: Any,
    calibration: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    ctx_size: int = 2048,
    batch_size: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    device_map: Any = None,
    load_in_4bit: bool = False,
    stream: bool = False,
    chat_template: str | os.PathLike[str] = "none",
    mask: str = "all",
    parse_special: bool = True,
    max_tokens: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> Profile:
    """Measure what each expert of a transformers model contributes on `calibration`, as `reap.profile` does for a GGUF
    file.

    `model` is the folder of a checkpoint, or a transformers model in memory, which stays as it is (its own device,
    types and implementation of experts; the loading options are then refused). Layers carry the checkpoint's numbers,
    which are the GGUF file's block indices. The calibration, `ctx_size`, `chat_template`, `mask`, `parse_special`,
    `max_tokens`, `checkpoint` and `resume` are those of `reap.profile`; loading options are `LoadOptions`'. `tokenizer`
    replaces the one of the checkpoint. `batch_size`: tokens of one pass, `ctx_size` by default; short samples share it,
    and what pads them reaches neither an expert nor the sums. `threads`: of the processor.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed, or what an option needs.
        UsageError: an option, a folder that is no checkpoint (one of pickles among them), a checkpoint file of another
        run. UnsupportedModelError: a dense model, or one whose experts are used in a way that cannot be measured.
        CalibrationError: as `reap.profile`. EngineError: transformers failed. Interrupted: Ctrl-C with a checkpoint,
        which was saved.
    """
    require_extra("reap.hf.profile")
    options = LoadOptions(device, dtype, device_map, load_in_4bit, stream, trust_remote_code)
    source = Calibration(
        calibration,
        ctx_size=ctx_size,
        chat_template=chat_template,
        mask=mask,
        parse_special=parse_special,
        max_tokens=max_tokens,
    )
    batch_size = ctx_size if batch_size is None else batch_size
    if type(batch_size) is not int or batch_size < ctx_size:
        raise UsageError(f"batch_size is {batch_size!r}, expected a whole number of at least ctx_size, {ctx_size}")
    if resume and checkpoint is None:
        raise UsageError("resume needs a checkpoint to go on from")
    options.check()
    subject = (
        _from_folder(model, options, tokenizer)
        if isinstance(model, str | os.PathLike)
        else _in_memory(model, options, tokenizer)
    )
    keeper = None
    if checkpoint is not None:
        keeper = Checkpoint(
            checkpoint,
            subject.identity(source, options, ctx_size, batch_size),
            seconds=checkpoint_seconds,
            resume=resume,
        )
    with _threads(threads):
        run = _measure(subject, source, keeper, batch_size, progress)
    return subject.to_profile(source, options, run)


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

    def identity(self, source: Calibration, options: LoadOptions, ctx_size: int, batch_size: int) -> dict[str, Any]:
        """What makes two runs the same run."""
        texts = {"chat_template": source.chat_template, "mask": source.mask, "parse_special": source.parse_special}
        sizes = {"ctx_size": ctx_size, "batch_size": batch_size, "max_tokens": source.max_tokens}
        return {
            "model": {
                "shapes": self._hash_shapes(),
                "files": self._hash_files(),
                "implementation": self._implementation(),
            },
            "calibration": identify_calibration(source.paths),
            "options": {**options.record(), **texts, **sizes},
            "reap": version(),
        }

    def to_profile(self, source: Calibration, options: LoadOptions, run: Run) -> Profile:
        """The sums of a run that has ended."""
        groups = {domain: run.session.sums(group) for group, domain in enumerate(run.domains[: run.session.n_groups])}
        summary = source.summary()
        if not any(int(sums["total_tokens"].sum()) for sums in groups.values()):
            if run.failed:
                raise EngineError(next(iter(run.failed.values())))
            raise CalibrationError(
                f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured"
            )
        failed = [run.failed[unit] for unit in sorted(run.failed)]
        return Profile.from_sums(
            layers=[layer.index for layer in self.layers],
            **total(list(groups.values())),
            model=self._record(run.session),
            calibration={**summary, "failed": len(failed), "failed_samples": failed},
            engine=self._engine(options),
            domains={domain: sums for domain, sums in groups.items() if domain is not None},
        )

    def _record(self, session: Any) -> dict[str, Any]:
        first = self.layers[0]
        counts = {
            "n_layers": int(getattr(self.config, "num_hidden_layers", 0) or 0),
            "n_experts": first.n_experts,
            "n_experts_used": session.n_experts_used,
            "n_groups": first.n_group,
            "n_groups_used": first.topk_group,
        }
        widths = {"n_embd": getattr(self.config, "hidden_size", 0), "vocab_size": getattr(self.config, "vocab_size", 0)}
        return {
            "name": self.name,
            "architecture": str(getattr(self.config, "model_type", "") or type(self.model).__name__),
            "fingerprint": structure_fingerprint(**counts, **widths, moe_layers=[layer.index for layer in self.layers]),
            **counts,
        }

    def _engine(self, options: LoadOptions) -> dict[str, Any]:
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


def _from_folder(path: str | os.PathLike[str], options: LoadOptions, tokenizer: Any) -> _Subject:
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


def _measure(
    subject: _Subject,
    source: Calibration,
    keeper: Checkpoint | None,
    batch_size: int,
    progress: ProgressCallback | None,
) -> Run:
    state = keeper.load() if keeper else None
    session = _open_session(subject, source, batch_size, progress)
    run = Run(session, subject.tokenizer, source, keeper, None if session.reports else progress)
    try:
        with _evaluating(subject.model):
            run.go(state or State())
            session.finish()
    except KeyboardInterrupt as interrupt:
        if keeper is None:
            raise
        keeper.save(run.state())
        raise Interrupted(
            f"stopped after {session.units} samples, which {keeper.path} keeps; --resume (resume=True) goes on from"
            " there"
        ) from interrupt
    if keeper:
        keeper.save(run.state())
    return run


def _open_session(
    subject: _Subject, source: Calibration, batch_size: int, progress: ProgressCallback | None
) -> ModelSession:
    from reap.hf.memory.sessions import ModelSession

    sizes = {"batch_size": batch_size, "n_sequences": SHARED_SEQUENCES, "pad_token": subject.tokenizer.eos or 0}
    if subject.store is None or not subject.store.is_streamed:
        return ModelSession(subject.model, subject.layers, **sizes)
    from reap.hf.memory.streaming import StreamingSession

    session = StreamingSession(subject.store, subject.layers, progress, **sizes)
    session.estimate = source.estimated_tokens
    return session


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
