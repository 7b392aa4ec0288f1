"""A checkpoint's folder -> a transformers model and its tokenizer. Nothing is downloaded, no pickle is opened."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from reap.errors import EngineError, FormatError, UnsupportedModelError, UsageError
from reap.hf.dependencies import require_extra, require_package
from reap.hf.disk import discovery

DTYPES = ("auto", "float32", "bfloat16", "float16")


class LoadArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `LoadOptions`, where they are explained."""

    device: str | None
    dtype: str
    device_map: Any
    load_in_4bit: bool
    stream: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded."""

    device: str | None = None
    """ "cpu", "cuda", "cuda:1", "mps"; None: the best there is."""
    dtype: str = "auto"
    """Of the weights: "auto" (as stored), "float32", "bfloat16", "float16"."""
    device_map: Any = None
    """accelerate's: "auto", or a map of modules to devices, "cpu" and "disk" among them; not together with device."""
    load_in_4bit: bool = False
    """Quantise the layers' matrices, the experts' among them, to NF4 as they are loaded, one layer at a time
    (bitsandbytes)."""
    stream: bool = False
    """One decoder layer in memory at a time."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings."""

    def check(self) -> None:
        """UsageError for options that cannot work, MissingExtraError for what they need and is not installed."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.device is not None and self.device_map is not None:
            raise UsageError("device and device_map exclude each other")
        if sum((self.stream, self.device_map is not None, self.load_in_4bit)) > 1:
            raise UsageError(
                "device_map, load_in_4bit and stream are three ways to load a model and exclude each other"
            )
        require_extra("working on a checkpoint", "torch", "transformers", "safetensors")
        if self.device_map is not None or self.load_in_4bit or self.stream:
            require_package("loading a model this way", "accelerate")
        if self.load_in_4bit:
            require_package("load_in_4bit", "bitsandbytes")

    def record(self) -> dict[str, Any]:
        """What changes numbers, for checkpoints and the profile's "engine"."""
        return {"dtype": self.dtype, "load_in_4bit": self.load_in_4bit, "stream": self.stream}


def check_folder(folder: Path) -> None:
    """Raise UsageError where `folder` is not a checkpoint that can be loaded without opening a pickle, or holds a link
    that may not be followed."""
    discovery.check_folder(folder)
    discovery.find_weights(folder)


def shards(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, as `reap.hf.disk` finds them. Raises what `find_weights`
    raises."""
    return [folder / name for name in discovery.find_weights(folder).names]


def load_config(folder: Path, options: LoadOptions) -> Any:
    """The configuration, as transformers reads it; weights that are published quantised are decoded as they are read.

    Raises UnsupportedModelError for a form that cannot be.
    """
    import transformers

    from reap.hf.memory.quantised import decode_when_read

    with translated(folder):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    decode_when_read(folder, config)
    return config


def load_model(folder: Path, options: LoadOptions) -> Any:
    """The model in evaluation mode, whole, on the devices asked for."""
    import torch

    shards(folder)
    config = load_config(folder, options)
    named: dict[str, Any] = {"dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)}
    offloaded = None
    if options.device_map is not None:
        # for what accelerate puts on disk; goes with the model
        offloaded = tempfile.TemporaryDirectory(prefix="reap-offload-", ignore_cleanup_errors=True)
        named |= {"device_map": options.device_map, "offload_folder": offloaded.name}
    with translated(folder):
        model, found = auto_class(config).from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            **named,
        )
        if "device_map" not in named:
            model = model.to(best_device(options.device))
    _check_loaded(folder, found, config)
    model._reap_offloaded = offloaded
    return model.eval()


def _check_loaded(folder: Path, found: Mapping[str, Any], config: Any) -> None:
    """What the model needs was there, or it would run on random numbers; its head is not needed."""
    from reap.hf.memory.quantised import refuse_unused

    refuse_unused(folder, found["unexpected_keys"], n_layers_of(config))
    lost = sorted(name for name in found["missing_keys"] if "lm_head" not in name.split("."))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise EngineError(f"{folder}: has no weights for {lost[0]}{more}")


def n_layers_of(config: Any) -> int:
    """The layers of the text model, those for prediction apart; a million where the configuration does not say."""
    inner = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(getattr(inner, "num_hidden_layers", 0) or 0) or 1_000_000


def auto_class(config: Any) -> Any:
    """The automatic class that builds a model of this configuration with a language model inside."""
    import transformers

    names = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModel")
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    remote = getattr(config, "auto_map", None) or {}
    for candidate in classes:
        if type(config) in candidate._model_mapping or candidate.__name__ in remote:
            return candidate
    raise UnsupportedModelError(f"{config.model_type}: transformers has no model for this configuration")


def best_device(asked: str | None = None) -> str:
    """The device asked for, else the fastest one there is. UsageError for one that is not there."""
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        detail = " ".join(str(error).split()).split(". ")[0][:150]
        raise UsageError(f"device {asked!r} cannot be used: {detail}") from error
    return asked


def load_tokenizer(folder: Path, options: LoadOptions) -> Any:
    """transformers' tokenizer of a folder; None where it has none."""
    import transformers

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in names):
        return None
    with translated(folder):
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=options.trust_remote_code, local_files_only=True
        )


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """transformers' errors as ours, in one sentence; its progress bars off."""
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    has_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except SafetensorError as error:
        raise FormatError(f"{folder}: its weights cannot be read: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        remote = "it brings Python code of its own, which runs only with trust_remote_code=True (--trust-remote-code)"
        detail = remote if "trust_remote_code" in said else said[:300]
        raise EngineError(f"{folder}: transformers cannot load it: {detail}") from error
    finally:
        if has_bars:
            logging.enable_progress_bar()
