"""What a smaller checkpoint is made of: which bytes of which file, under which name, and the JSON texts beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from reap.errors import UnsupportedModelError
from reap.files.ranges import RawFile, Span, merge_spans
from reap.hf.disk.checkpoint_files import PROVENANCE, Checkpoint
from reap.hf.disk.config import patch_config, patch_names
from reap.hf.disk.discovery import CONFIG, INDEX
from reap.hf.disk.expert_names import ExpertNames
from reap.hf.disk.info import PROVENANCE_FORMAT, CheckpointInfo, origin
from reap.hf.disk.layout import CheckpointLayout, Follows, is_of_prediction
from reap.hf.disk.mentions import find_mentions
from reap.hf.disk.safetensors_file import SafetensorsFile, StoredTensor, encode_header
from reap.pruning.compatibility import recorded_mismatch
from reap.pruning.gguf import Kept
from reap.scores.plan import PrunePlan

#: Numbers of prediction layers in config.json, which become 0 where those are left out.
_PREDICTION_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


@dataclass(frozen=True)
class _NewTensor:
    """One tensor of the new checkpoint: its header entry, and the ranges of the source that it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def n_bytes(self) -> int:
        return sum(span.n_bytes for span in self.spans)


class Job:
    """One pruning: what every file of the new checkpoint is made of. shards: file name -> its tensors, in order."""

    def __init__(
        self, checkpoint: Checkpoint, layout: CheckpointLayout, info: CheckpointInfo, plan: PrunePlan, drop: bool
    ) -> None:
        self.checkpoint, self.layout, self.info, self.plan, self.drop = checkpoint, layout, info, plan, drop
        self.kept: Kept = {layer: plan.layers[layer] for layer in layout.moe_layers}
        self.place = {layer: {expert: row for row, expert in enumerate(kept)} for layer, kept in self.kept.items()}
        self.names = ExpertNames(layout, self.kept, list(checkpoint.shard_of))
        self.texts: Mapping[str, str] = {}
        made = {shard: tuple(self._tensors(shard, file)) for shard, file in checkpoint.shards.items()}
        self.shards: Mapping[str, tuple[_NewTensor, ...]] = {
            shard: tensors for shard, tensors in made.items() if tensors
        }

    def files(self) -> dict[str, RawFile]:
        """Every file to write anew -> its contents: shards, config.json, the index, reap.json."""
        files = {
            shard: RawFile(
                (self._header(shard, tensors), *merge_spans(span for tensor in tensors for span in tensor.spans))
            )
            for shard, tensors in self.shards.items()
        }
        texts = {CONFIG: self._config()}
        for name, text in self.checkpoint.quantisation_texts().items():
            texts[name] = patch_names(text, self.names)
        for name, text in texts.items():
            self._check_names(name, text)
        self.texts = dict(texts)
        if self.checkpoint.index is not None:
            texts[INDEX] = json.dumps(self._index(self.checkpoint.index), indent=2, ensure_ascii=False) + "\n"
        texts[PROVENANCE] = json.dumps(self._provenance(), ensure_ascii=False) + "\n"
        return files | {name: RawFile((text.encode(),)) for name, text in texts.items()}

    def pairs(self, tensor: StoredTensor) -> Iterator[tuple[str, int, int, int]]:
        """(name of the new tensor, offset in it, offset in the old file, bytes) of every run of bytes that stays of an
        old tensor."""
        how = self.layout.follows.get(tensor.name)
        if self._is_dropped(tensor.name):
            return
        if how is None:
            yield tensor.name, 0, tensor.offset_bytes, tensor.n_bytes
        elif how.expert is None:
            size = tensor.n_bytes // self.layout.n_experts
            for row, expert in enumerate(self.kept[how.layer]):
                yield tensor.name, row * size, tensor.offset_bytes + expert * size, size
        elif how.expert in self.place[how.layer]:
            yield self._renamed(how, how.expert), 0, tensor.offset_bytes, tensor.n_bytes

    def _is_dropped(self, name: str) -> bool:
        return self.drop and is_of_prediction(name, self.layout.n_layers)

    def _renamed(self, how: Follows, expert: int) -> str:
        return f"{how.prefix}{self.place[how.layer][expert]}{how.suffix}"

    def _tensors(self, shard: str, file: SafetensorsFile) -> Iterator[_NewTensor]:
        for tensor in self.checkpoint.tensors_of(shard):
            runs = list(self.pairs(tensor))
            if runs:
                spans = tuple(Span(file, offset, n_bytes) for _, _, offset, n_bytes in runs)
                yield _NewTensor(runs[0][0], tensor.dtype, self._shape(tensor), spans)

    def _shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        how = self.layout.follows.get(tensor.name)
        if how is None or how.expert is not None:
            return tensor.shape
        shape = list(tensor.shape)
        shape[how.axis] = shape[how.axis] // self.layout.n_experts * len(self.kept[how.layer])
        return tuple(shape)

    def _header(self, shard: str, tensors: tuple[_NewTensor, ...]) -> bytes:
        entries = ((tensor.name, tensor.dtype, tensor.shape, tensor.n_bytes) for tensor in tensors)
        return encode_header(self.checkpoint.shards[shard].metadata, entries)

    def _config(self) -> str:
        zeros = _PREDICTION_KEYS if self.drop else ()
        checkpoint, counts = self.checkpoint, self.layout.counts
        return patch_config(checkpoint.config_text, checkpoint.config, counts, self.plan.keep, self.names, zeros)

    def _check_names(self, name: str, text: str) -> None:
        """Nothing names an expert by a number that may be wrong from now on."""
        found = find_mentions(json.loads(text), self.layout.n_experts, self.names.settled).names
        if found and any(len(kept) < self.layout.n_experts for kept in self.kept.values()):
            raise UnsupportedModelError(
                f"{self.checkpoint.directory / name}: names experts by number in a way that reap cannot follow"
                f" ({found[0]}{f', and {len(found) - 1} more' if len(found) > 1 else ''})"
            )

    def _index(self, index: dict[str, Any]) -> dict[str, Any]:
        """The old index with the new names, in its order, then those that it lacks, and the new sizes."""
        shards = {tensor.name: shard for shard, tensors in self.shards.items() for tensor in tensors}
        weight_map = {}
        for name in dict.fromkeys([*index["weight_map"], *self.checkpoint.shard_of]):
            if name in self.checkpoint.shard_of:
                for new_name, *_ in self.pairs(self.checkpoint.tensor(name)):
                    weight_map[new_name] = shards[new_name]
        metadata = dict(index.get("metadata") or {})
        metadata["total_size"] = sum(tensor.n_bytes for tensors in self.shards.values() for tensor in tensors)
        if isinstance(metadata.get("total_parameters"), int):
            before = sum(prod(tensor.shape) for tensor in self.checkpoint.tensors if _is_parameter(tensor.name))
            after = sum(
                prod(tensor.shape)
                for tensors in self.shards.values()
                for tensor in tensors
                if _is_parameter(tensor.name)
            )
            metadata["total_parameters"] -= before - after
        return {**index, "metadata": metadata, "weight_map": weight_map}

    def _provenance(self) -> dict[str, Any]:
        """Which experts are left, in ids of the original checkpoint."""
        from reap import __version__

        start, mismatch = origin(self.info), recorded_mismatch(self.info, self.plan)
        kept = {str(layer): [start.kept[layer][expert] for expert in experts] for layer, experts in self.kept.items()}
        return {
            "format": PROVENANCE_FORMAT,
            "version": 1,
            "reap": __version__,
            "metric": self.plan.metric,
            "source": {"fingerprint": start.fingerprint, "n_experts": start.n_experts},
            "calibration": {"sha256": list(self.plan.calibration_sha256)},
            **({"mismatch": mismatch} if mismatch else {}),
            "kept": kept,
        }


def _is_parameter(name: str) -> bool:
    """Whether transformers counts a tensor as a parameter: correction biases are buffers there."""
    return not name.endswith(("correction_bias", "expert_bias"))
