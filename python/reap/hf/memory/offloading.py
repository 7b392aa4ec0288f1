"""Reading and replacing a module's tensor wherever accelerate keeps it: on a device, on the host, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import UnsupportedModelError


def read_tensor(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter or buffer. UnsupportedModelError where they are nowhere, or quantised in a way that
    cannot be cut."""
    tensor = _held(module, name)
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} is quantised by bitsandbytes and cannot be cut; load the model without"
            " that"
        )
    if tensor.device.type != "meta":
        return tensor
    store = _store(module)
    if store is None:
        raise UnsupportedModelError(f"{type(module).__name__}.{name} has no values: its weights were not loaded")
    values: Tensor = store[name]
    return values


def replace_tensor(module: nn.Module, name: str, values: Tensor) -> None:
    """Put `values`, of another shape, in the place of a parameter or buffer; what is offloaded stays offloaded."""
    held = _held(module, name)
    is_offloaded = held.device.type == "meta"
    if is_offloaded:
        _put(_store(module), name, values)
        values = torch.empty_like(values, device="meta")
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(values, requires_grad=held.requires_grad)
    else:
        module._buffers[name] = values


def _held(module: nn.Module, name: str) -> Tensor:
    found: Tensor | None = {**module._parameters, **module._buffers}[name]
    assert found is not None
    return found


def _store(module: nn.Module) -> Any:
    """The mapping from which accelerate's hook fetches a module's weights before it runs; None without one."""
    return next((hook.weights_map for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None), None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _put(store: Any, name: str, values: Tensor) -> None:
    while hasattr(store, "dataset") and hasattr(store, "prefix"):  # a view on a larger mapping
        name, store = f"{store.prefix}{name}", store.dataset
    if isinstance(store, dict):
        store[name] = values.cpu()
        return
    folder, index = getattr(store, "save_folder", None), getattr(store, "index", None)
    if folder is not None and index is not None and name not in store.state_dict:
        from accelerate.utils import offload_weight

        # what came from safetensors or a file of the folder is from now on a file of the folder
        index.pop(name, None)
        offload_weight(values.cpu(), name, str(folder), index=index)
    else:
        store.state_dict[name] = values.cpu()
