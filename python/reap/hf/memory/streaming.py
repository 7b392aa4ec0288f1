"""Models larger than memory: one decoder layer's weights at a time, and all passes of a batch wait for each other at
every layer.

A forward pass runs in a thread of its own that stops wherever the model is about to call a decoder layer, and goes on
when that layer is loaded. So the model's own forward does what it always does (masks, positions, layers of several
kinds), and only one thread runs at a time. What is kept of a pass between two layers is its hidden state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from reap.errors import EngineError, UnsupportedModelError
from reap.hf.memory.loading import LoadOptions, auto_class, best_device, load_config, shards, translated
from reap.hf.memory.modules import MoELayer, find_moe_layers
from reap.hf.memory.quantised import refuse_unused
from reap.hf.memory.sessions import Batch, Int32s, ModelSession
from reap.profiling.run import BrokenModelError

# tokens of one batch: for each batch the model is read once, and its hidden states are in memory (a width of 4096 in 16
# bits: 1 GiB)
ROUND_TOKENS = 1 << 17


class LayerStore:
    """A model whose decoder layers are loaded and dropped one by one. `model` has all other weights, and none of the
    layers'.

    Raises UnsupportedModelError where the layers are in no list.
    """

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        from accelerate import init_empty_weights

        self._folder, self.is_streamed = folder, options.stream
        self._device = torch.device(best_device(options.device))
        config = load_config(folder, options)
        self.dtype = _dtype_of(config, options)
        with translated(folder):
            self._quantizer, config = _quantizer(config)
            with init_empty_weights(include_buffers=False):
                self.model = (
                    auto_class(config)
                    .from_config(config, dtype=self.dtype, trust_remote_code=options.trust_remote_code)
                    .eval()
                )
            if self._quantizer is not None:
                self._quantizer.preprocess_model(
                    model=self.model,
                    dtype=self.dtype,
                    device_map=None,
                    checkpoint_files=shards(folder),
                    use_kernels=False,
                )
            self._move_buffers()
            self.moe_layers = list(find_moe_layers(self.model).values())
            self.list_name = _common_list(self.moe_layers)
            self.layers = list(self.model.get_submodule(self.list_name))
            self._keys = self._sort_keys()
            self.load(None)

    def load(self, layer: int | None) -> None:
        """Put the weights of a layer in place; None: those outside of the layers."""
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        with translated(self._folder), ExitStack() as files:
            state: dict[str, Any] = {}
            for path, names in self._keys.get(layer, {}).items():
                opened = files.enter_context(safe_open(path, framework="pt"))
                state.update({name: opened.get_slice(name) for name in names})
            config = LoadStateDictConfig(
                weight_mapping=self._mapping(),
                dtype=self.dtype,
                device_map={"": self._device},
                hf_quantizer=self._quantizer,
            )
            found, _ = convert_and_load_state_dict_in_model(self.model, state, config)
            refuse_unused(self._folder, found.unexpected_keys, len(self.layers))
            root = self.model if layer is None else self.layers[layer]
            self._refuse_missing(root, layer)

    def load_in_4bit(self) -> None:
        """Load all layers, each quantised to NF4 before the next one comes: matrices of the layers and of the experts,
        but no router."""
        routers = {id(part) for layer in self.moe_layers for part in layer.router.modules()}
        for number, layer in enumerate(self.layers):
            self.load(number)
            for module in layer.modules():
                if id(module) not in routers:
                    _quantise(module)

    def drop(self, layer: int) -> None:
        """Forget a layer's weights."""
        for module in self.layers[layer].modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(tensor, device="meta"), requires_grad=False
                    )

    def _mapping(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(
            get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer)
        )  # new ones each time: they collect tensors

    def _sort_keys(self) -> dict[int | None, dict[Path, list[str]]]:
        """layer -> file -> names in it; the output head, which nothing here calls, is left out."""
        from safetensors import safe_open
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        keys: dict[int | None, dict[Path, list[str]]] = {}
        for path in shards(self._folder):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                target, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
                inside = target.removeprefix(f"{self.list_name}.")
                number = int(inside.split(".")[0]) if inside != target else None
                if number is not None and number >= len(self.layers):
                    continue
                if number is None and target.startswith("lm_head"):
                    continue
                keys.setdefault(number, {}).setdefault(path, []).append(name)
        return keys

    def _refuse_missing(self, root: nn.Module, layer: int | None) -> None:
        inside = f"{self.list_name}."
        for name, tensor in root.named_parameters():
            is_elsewhere = layer is None and (name.startswith(inside) or name.startswith("lm_head"))
            if tensor.device.type == "meta" and not is_elsewhere:
                place = "" if layer is None else f"{inside}{layer}."
                raise EngineError(f"{self._folder}: has no weights for {place}{name}")

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)


class StreamingSession(ModelSession):
    """As ModelSession, for a LayerStore. A batch is large, because the model is read once for each; it is run in passes
    of at most `pass_size` tokens, padding included, which wait for each other at every layer.

    Attributes:
        pass_size: a window that is longer is a pass of its own
    """

    def __init__(self, store: LayerStore, layers: Sequence[MoELayer], *, pass_size: int, pad_token: int) -> None:
        batch_size = max(ROUND_TOKENS, pass_size)
        super().__init__(store.model, layers, batch_size=batch_size, n_sequences=batch_size, pad_token=pad_token)
        self._store = store
        self._pass_size = pass_size
        self._report: Callable[[float], None] = lambda _: None

    def report_to(self, report: Callable[[float], None]) -> None:
        """From now on, call `report` after each layer with the share of the running batch that is through."""
        self._report = report

    def profile_batch(self, tokens: Int32s, positions: Int32s, sequences: Int32s, groups: Int32s) -> None:
        """Run windows, all through one layer before any through the next."""
        with self._translated():
            self._run_passes(list(self._batches(tokens, sequences, groups)))

    def _fit(self, rows: Sequence[NDArray[Any]]) -> int:
        return min(super()._fit(rows), max(1, self._pass_size // len(rows[0])))

    def _run_passes(self, batches: Sequence[Batch]) -> None:
        self._sums = {}
        turnstile = _Turnstile(self._store.layers)
        passes = [turnstile.make(lambda batch=batch: self._forward(batch)) for batch in batches]  # type: ignore[misc]
        with self._observer.watching(), turnstile:
            self._advance(passes, batches)
            for number in range(len(self._store.layers)):
                try:
                    self._store.load(number)
                except EngineError as error:
                    raise BrokenModelError(str(error)) from error
                self._advance(passes, batches)
                self._store.drop(number)
                self._report((number + 1) / (len(self._store.layers) + 1))  # the rest is for what follows the layers
        self._collect()

    def _advance(self, passes: Sequence[_Pass], batches: Sequence[Batch]) -> None:
        for running, batch in zip(passes, batches, strict=True):
            self._begin(batch)
            running.resume()


class _Abandoned(BaseException):
    """Ends a pass whose result is not wanted any more."""


class _Pass:
    """A forward pass in a thread, stopped before each decoder layer."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._main, daemon=True)

    def resume(self) -> None:
        """Run up to the next decoder layer, or to the end; raises what the pass raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop_here(self) -> None:
        """Called in the thread."""
        self._stopped.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _Abandoned

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def abandon(self) -> None:
        """End the thread, wherever it waits."""
        self._is_abandoned = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                self._work()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()


class _Turnstile:
    """Stops passes before each of the layers while it is entered; leaving it ends them all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._passes: list[_Pass] = []
        self._handles: list[Any] = []

    def make(self, work: Callable[[], object]) -> _Pass:
        made = _Pass(work)
        self._passes.append(made)
        return made

    def __enter__(self) -> None:
        self._handles = [layer.register_forward_pre_hook(self._stop) for layer in self._layers]

    def __exit__(self, *_: object) -> None:
        for running in self._passes:
            running.abandon()
        for handle in self._handles:
            handle.remove()

    def _stop(self, _module: nn.Module, _inputs: object) -> None:
        next(running for running in self._passes if running.is_this_thread()).stop_here()


def _quantise(module: nn.Module) -> None:
    """Replace a linear map's matrix, or tensors of several experts' matrices, by NF4 that is unpacked for each call."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    n_axes = 2 if isinstance(module, nn.Linear) else 3
    names = [name for name, tensor in module.named_parameters(recurse=False) if tensor.dim() == n_axes]
    # a convolution has three axes as well; its weights are few
    for name in names if n_axes == 2 or not isinstance(module, nn.modules.conv._ConvNd) else ():
        replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


def _common_list(layers: Sequence[MoELayer]) -> str:
    """Name of the list that holds the decoder layers: model.layers."""
    names = {layer.name.split(f".{layer.index}.")[0] for layer in layers if f".{layer.index}." in layer.name}
    if len(names) != 1:
        raise UnsupportedModelError(
            f"{layers[0].name}: the layers are in no list of their own, so they cannot be loaded one by one"
        )
    return names.pop()


def _quantizer(config: Any) -> tuple[Any, Any]:
    """(what decodes the weights of a checkpoint that is published quantised, the configuration); None for others."""
    from transformers.quantizers.auto import get_hf_quantizer

    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    return quantizer, config


def _dtype_of(config: Any, options: LoadOptions) -> torch.dtype:
    if options.dtype != "auto":
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
