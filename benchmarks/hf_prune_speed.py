"""How fast `reap.hf.prune` writes a checkpoint, against `cp`, and how much memory it takes.

    python benchmarks/hf_prune_speed.py [--dir DIR] [--pairs 5] [--layers 8] [--quick]

Needs about 25 GB of disk. Prints, from one run:
- bytes written per second of prune() and of `cp -r --reflink=never` of a folder of the output's size on the same disk,
  in turn, with fsync on both; once with the sources in memory and once not; medians and the ratio of each pair. Nothing
  is sparse there;
- the same against the safetensors package: every tensor loaded, renamed and saved, shard by shard;
- peak resident memory and time of the pruning processes.
The checkpoint has the tensors of a Qwen3-MoE with 128 experts in 16 bits, one for each expert and matrix, in shards of
at most 5 GB; every other draw of a seeded generator decides who stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from prune_speed import describe_machine, forget, remember, run_process, timed

from reap import hf
from reap.scores.plan import PrunePlan

N_EXPERTS, N_USED, N_EMBD, N_FF = 128, 8, 2048, 768
LAYERS_PER_SHARD = 4

PRUNE = (
    "import sys; from reap import hf; hf.prune(sys.argv[1], sys.argv[2], sys.argv[3], force=True, verify=sys.argv[4])"
)
# the straightforward way: every tensor of a shard in memory, by the safetensors package
STRAIGHTFORWARD = """
import json, os, re, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
source, output = Path(sys.argv[1]), Path(sys.argv[2])
kept = {int(layer): item["kept"] for layer, item in json.loads(Path(sys.argv[3]).read_text())["layers"].items()}
output.mkdir()
for path in sorted(source.glob("*.safetensors")):
    small = {}
    for name, tensor in load_file(path).items():
        layer, expert = re.search(r"layers\\.(\\d+)", name), re.search(r"experts\\.(\\d+)\\.", name)
        if expert is None:
            small[name] = tensor[kept[int(layer[1])]] if "mlp.gate." in name else tensor
        elif int(expert[1]) in kept[int(layer[1])]:
            small[name.replace(expert[0], f"experts.{kept[int(layer[1])].index(int(expert[1]))}.")] = tensor
    save_file(small, output / path.name, metadata={"format": "pt"})
    fd = os.open(output / path.name, os.O_RDONLY)
    os.fsync(fd)
"""


def layer_tensors(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor."""
    yield f"model.layers.{layer}.mlp.gate.weight", (N_EXPERTS, N_EMBD)
    for expert in range(N_EXPERTS):
        for kind, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            yield f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight", shape


def write_checkpoint(directory: Path, n_layers: int) -> Path:
    """Random bytes; the header written here."""
    directory.mkdir()
    shards = -(-n_layers // LAYERS_PER_SHARD)
    weight_map = {}
    rng = np.random.default_rng(0)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, offset = {}, 0
        for layer in range(shard * LAYERS_PER_SHARD, min(n_layers, (shard + 1) * LAYERS_PER_SHARD)):
            for tensor, shape in layer_tensors(layer):
                n_bytes = 2 * shape[0] * shape[1]
                header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + n_bytes]}
                weight_map[tensor], offset = name, offset + n_bytes
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            while offset:
                file.write(rng.bytes(part := min(offset, 64 << 20)))
                offset -= part
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": n_layers,
        "num_experts": N_EXPERTS,
        "num_experts_per_tok": N_USED,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_plan(path: Path, n_layers: int) -> Path:
    """A random half for every layer."""
    rng = np.random.default_rng(1)
    layers = {layer: tuple(sorted(rng.permutation(N_EXPERTS)[: N_EXPERTS // 2].tolist())) for layer in range(n_layers)}
    return PrunePlan({"n_experts": N_EXPERTS}, "random", N_EXPERTS // 2, layers).save(path)


def each(action: Callable[[Path], object], directory: Path) -> None:
    """Do something with every file of a folder."""
    for path in sorted(directory.iterdir()):
        action(path)


def copy(source: Path, target: Path) -> None:
    """`cp -r`, and an fsync of every file."""
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    subprocess.run(["sync", *sorted(target.iterdir())], check=True)  # fsync of each


def rate(n_bytes: int, seconds: list[float]) -> str:
    """Megabytes per second."""
    return f"{n_bytes / statistics.median(seconds) / 1e6:6.0f} MB/s"


def compare_with_cp(source: Path, plan: Path, pairs: int) -> None:
    """Rates in turn, the time to read the output back (verify fast) included."""
    folder = source.parent
    output, target, reference = folder / "output", folder / "copy", folder / "reference"
    n_bytes = hf.prune(source, reference, plan).n_bytes_after
    n_source = sum(path.stat().st_size for path in source.iterdir())
    print(
        f"input {n_source / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, output {n_bytes / 1e9:.2f}"
        f" GB, {pairs} pairs"
    )
    gone = folder / "gone"  # `timed` removes a file before it starts; there is none
    for state, prepare in (("in memory", remember), ("not in memory", forget)):
        times: dict[str, list[float]] = {"prune": [], "cp": []}
        for pair in range(pairs):
            for name in ("prune", "cp") if pair % 2 else ("cp", "prune"):
                for old in (output, target):
                    shutil.rmtree(old, ignore_errors=True)
                each(prepare, source if name == "prune" else reference)
                work = (
                    (lambda: hf.prune(source, output, plan)) if name == "prune" else (lambda: copy(reference, target))
                )
                times[name].append(timed(work, gone))
        ratios = [cp / prune for prune, cp in zip(times["prune"], times["cp"], strict=True)]
        spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  source {state:13}: prune {rate(n_bytes, times['prune'])}, cp {rate(n_bytes, times['cp'])}", end="")
        print(f", ratio {statistics.median(ratios):.2f} (pairs: {spread})", flush=True)
    for old in (output, target, reference):
        shutil.rmtree(old, ignore_errors=True)


def processes(source: Path, plan: Path) -> None:
    """Whole processes: time and peak memory."""
    output = source.parent / "process"
    runs = [(f"reap.hf.prune, verify {verify}", PRUNE, verify) for verify in ("fast", "full", "none")]
    for label, script, option in [*runs, ("safetensors package, shard by shard", STRAIGHTFORWARD, "")]:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        each(remember, source)
        seconds, peak, _ = run_process(sys.executable, "-c", script, source, output, plan, option)
        n_bytes = sum(path.stat().st_size for path in output.iterdir())
        print(f"  {label:36} {n_bytes / seconds / 1e6:6.0f} MB/s, {seconds:6.2f} s, peak {peak:6.0f} MB", flush=True)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="of the checkpoint; a layer is 1.2 GB")
    parser.add_argument("--quick", action="store_true", help="small, to see whether it works")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        describe_machine(folder)
        n_layers = 1 if options.quick else options.layers
        source, plan = write_checkpoint(folder / "model", n_layers), write_plan(folder / "plan.json", n_layers)
        compare_with_cp(source, plan, options.pairs)
        print("\nwhole processes, source in memory, fsync in each")
        processes(source, plan)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
