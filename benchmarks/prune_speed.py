"""How fast `reap.prune` writes, against `cp` and against the straightforward way, and how much memory it takes.

    python benchmarks/prune_speed.py [--dir DIR] [--pairs 7] [--layers 8] [--quick]

Needs about 8 GB of disk. Prints, from one run:
- bytes written per second of prune() and of `cp --reflink=never` of a file of the output's size on the same disk, in
  turn, with fsync on both; once with the sources in memory and once not; medians and the ratio of each pair. Nothing is
  sparse there. Where the source is not in memory the disk has to read ranges that lie apart, which `cp` of a whole file
  does not: so there is also the rate of a plain loop of reads and writes over the same ranges, and what the disk alone
  reads either way;
- the same against the `gguf` package's reader and writer with numpy.take;
- whether the kernel shared blocks between source and output (FIEMAP);
- peak resident memory of a pruning process for inputs of 1, 4 and 16 GB (sparse files, whose outputs are written in
  full);
- wall time and memory of `reap inspect` for a vocabulary of 150,000 tokens, and for a sparse model of 200 GB.
The models have the tensors of a Qwen3-MoE with 128 experts, in Q4_K; every other draw of a seeded generator decides who
stays.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import reap
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from reap.gguf.model_info import inspect
from reap.scores.plan import PrunePlan

N_EXPERTS, N_USED, N_EMBD, N_FF = 128, 8, 2048, 768
Q4_K_BLOCK, Q4_K_BYTES = 256, 144
FS_IOC_FIEMAP, FIEMAP_EXTENT_SHARED, FIEMAP_SYNC = 0xC020660B, 0x2000, 1

# how a process of its own prunes: source, output, plan
PRUNE = "import sys, reap; reap.prune(sys.argv[1], sys.argv[2], sys.argv[3], force=True)"
# the straightforward way: every tensor through numpy
STRAIGHTFORWARD = """
import os, sys
import numpy as np
from gguf import GGUFReader, GGUFWriter, GGUFValueType
from reap.scores.plan import PrunePlan
source, output, plan = sys.argv[1], sys.argv[2], PrunePlan.load(sys.argv[3])
reader = GGUFReader(source)
architecture = reader.fields["general.architecture"].contents()
writer = GGUFWriter(output, architecture)
for key, field in reader.fields.items():
    if key.startswith("GGUF.") or key == "general.architecture":
        continue
    value = plan.keep if key == f"{architecture}.expert_count" else field.contents()
    writer.add_key_value(key, value, field.types[0], sub_type=field.types[1] if len(field.types) > 1 else None)
for tensor in reader.tensors:
    data = tensor.data
    if "_exps." in tensor.name or "ffn_gate_inp." in tensor.name:
        data = np.take(data, plan.layers[int(tensor.name.split(".")[1])], axis=0)
    writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
fd = os.open(output, os.O_RDONLY)
os.fsync(fd)
"""
# starts a process and says how long it took and how much memory; it is small itself, since a child's peak begins with
# its parent's
LAUNCH = """
import os, sys, time
started = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - started
print(f"\\n\\0{seconds} {usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e6}")
sys.exit(status != 0)
"""


# ---- models


def write_model(path: Path, n_layers: int, *, sparse: bool, n_vocab: int = 0) -> Path:
    """A model whose experts are random bytes, or holes; the header is the `gguf` package's."""
    writer = GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(n_layers)
    writer.add_context_length(4096)
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(N_USED)
    if n_vocab:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"token{index}" for index in range(n_vocab)])
        writer.add_token_types([1] * n_vocab)
        writer.add_token_merges([f"to ken{index}" for index in range(n_vocab)])
    sizes = []
    for layer in range(n_layers):
        sizes.append(
            add_tensor(writer, f"blk.{layer}.ffn_gate_inp.weight", (N_EXPERTS, N_EMBD), GGMLQuantizationType.F32)
        )
        for name, rows, columns in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
            shape = (N_EXPERTS, rows, columns)
            sizes.append(add_tensor(writer, f"blk.{layer}.ffn_{name}_exps.weight", shape, GGMLQuantizationType.Q4_K))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fill(path, sizes, sparse=sparse)
    return path


def add_tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Declare a tensor; its bytes."""
    n_elements = int(np.prod(shape))
    n_bytes = n_elements // Q4_K_BLOCK * Q4_K_BYTES if kind == GGMLQuantizationType.Q4_K else 4 * n_elements
    writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
    return n_bytes


def fill(path: Path, sizes: list[int], *, sparse: bool) -> None:
    """Append the tensors' bytes; every size is a multiple of the alignment."""
    start = -(-path.stat().st_size // 32) * 32
    if sparse:
        os.truncate(path, start + sum(sizes))
        return
    rng = np.random.default_rng(0)
    with open(path, "r+b") as file:
        file.seek(start)
        left = sum(sizes)
        while left:
            block = rng.bytes(min(left, 64 << 20))
            file.write(block)
            left -= len(block)
        file.flush()
        os.fsync(file.fileno())


def write_plan(model: Path, keep: int) -> Path:
    """A random choice for every layer."""
    info = inspect(model)
    rng = np.random.default_rng(1)
    layers = {layer: tuple(sorted(rng.permutation(N_EXPERTS)[:keep].tolist())) for layer in info.moe_layers}
    plan = PrunePlan({"n_experts": N_EXPERTS, "fingerprint": info.fingerprint}, "random", keep, layers)
    return plan.save(model.with_suffix(".plan.json"))


# ---- measuring


def forget(path: Path) -> None:
    """Out of memory with it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(path: Path) -> None:
    """Read it, so that it is in memory."""
    with open(path, "rb", buffering=0) as file:
        while file.read(16 << 20):
            pass


def copy(source: Path, target: Path) -> None:
    """`cp`, and an fsync."""
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def timed(work: Callable[[], object], target: Path) -> float:
    """Seconds of `work`; what it wrote is removed before and after, and the disk is let come to rest."""
    target.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run_process(*command: str | Path) -> tuple[float, float, str]:
    """(seconds, peak resident MB, stdout) of a process."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", LAUNCH, *map(str, command)], capture_output=True, text=True, check=True
    )
    text, _, figures = done.stdout.rpartition("\n\0")
    seconds, peak = map(float, figures.split())
    return seconds, peak, text


def shared_bytes(path: Path) -> int | None:
    """Bytes of a file whose blocks another file has as well; None where the file system does not say."""
    shared, start = 0, 0
    with open(path, "rb") as file:
        while True:
            request = bytearray(struct.pack("=QQIIII", start, 2**63, FIEMAP_SYNC, 0, 512, 0) + bytes(56 * 512))
            try:
                fcntl.ioctl(file, FS_IOC_FIEMAP, request)
            except OSError:
                return None
            n_extents = struct.unpack_from("=QQIIII", request)[3]
            if not n_extents:
                return shared
            for index in range(n_extents):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQI", request, 32 + 56 * index)
                shared += length if flags & FIEMAP_EXTENT_SHARED else 0
            start = logical + length


# ---- what is printed


def describe_machine(folder: Path) -> None:
    """Processor, cores, kernel, disk."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", folder], capture_output=True, text=True, check=False)
    kind = found.stdout.strip() or "unknown"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    print(
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.release()}, {kind}"
        " on a virtual disk"
    )
    print(
        f"Python {platform.python_version()}, reap {reap.__version__}, load average {os.getloadavg()[0]:.1f}\n",
        flush=True,
    )


def kept_ranges(model: Path, plan: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of what a prune copies, neighbours drawn together."""
    layers, ranges = PrunePlan.load(plan).layers, list[tuple[int, int]]()
    for tensor in GGUFReader(model).tensors:
        size = int(tensor.n_bytes) // N_EXPERTS
        for expert in layers[int(tensor.name.split(".")[1])]:
            start = int(tensor.data_offset) + expert * size
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
            else:
                ranges.append((start, size))
    return ranges


def plain_loop(source: Path, ranges: list[tuple[int, int]], target: Path | None) -> None:
    """What `cp` does, over ranges: reads and writes of 128 KiB, and an fsync."""
    buffer = memoryview(bytearray(128 << 10))
    with open(source, "rb", buffering=0) as file, open(target or os.devnull, "wb", buffering=0) as out:
        for start, n_bytes in ranges:
            file.seek(start)
            while n_bytes > 0:
                done = file.readinto(buffer[:n_bytes])
                out.write(buffer[:done])
                n_bytes -= done
        if target is not None:
            os.fsync(out.fileno())


def compare_scattered(model: Path, plan: Path, reference: Path, pairs: int) -> None:
    """Prune against a plain loop over the same ranges, none of it in memory; and what the disk alone does."""
    output, ranges = model.with_name("output.gguf"), kept_ranges(model, plan)
    n_bytes = sum(size for _, size in ranges)
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for name in ("prune", "loop") if pair % 2 else ("loop", "prune"):
            forget(model)
            work = (
                (lambda: reap.prune(model, output, plan))
                if name == "prune"
                else (lambda: plain_loop(model, ranges, output))
            )
            seconds[name] = timed(work, output)
        ratios.append(seconds["loop"] / seconds["prune"])
    print(f"  against a plain loop over the same ranges, not in memory: ratio {statistics.median(ratios):.2f}", end="")
    print(f" (pairs: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    forget(reference)
    whole = timed(lambda: plain_loop(reference, [(0, reference.stat().st_size)], None), output)
    forget(model)
    apart = timed(lambda: plain_loop(model, ranges, None), output)
    print(
        f"  the disk alone: a whole file {n_bytes / whole / 1e6:.0f} MB/s, the ranges {n_bytes / apart / 1e6:.0f} MB/s",
        flush=True,
    )


def compare_with_cp(model: Path, plan: Path, pairs: int) -> Path:
    """Rates in turn; the output."""
    output, target = model.with_name("output.gguf"), model.with_name("copy.gguf")
    reference = model.with_name("reference.gguf")  # what cp copies: a file of the output's size
    n_bytes = reap.prune(model, reference, plan, force=True).n_bytes_after
    assert os.stat(reference).st_blocks * 512 >= n_bytes, "the output is sparse"
    print(
        f"input {model.stat().st_size / 1e9:.2f} GB, output {n_bytes / 1e9:.2f} GB, {pairs} pairs in turn, fsync on"
        " both"
    )
    for state, prepare in (("in memory", remember), ("not in memory", forget)):
        times: dict[str, list[float]] = {"prune": [], "cp": []}
        for pair in range(pairs):
            for name in ("prune", "cp") if pair % 2 else ("cp", "prune"):
                prepare(model if name == "prune" else reference)
                if name == "prune":
                    times[name].append(timed(lambda: reap.prune(model, output, plan, force=True), output))
                else:
                    times[name].append(timed(lambda: copy(reference, target), target))
        rates = {name: n_bytes / statistics.median(seconds) / 1e6 for name, seconds in times.items()}
        ratio = statistics.median(cp / prune for prune, cp in zip(times["prune"], times["cp"], strict=True))
        spread = ", ".join(f"{cp / prune:.2f}" for prune, cp in zip(times["prune"], times["cp"], strict=True))
        print(f"  source {state:13}: prune {rates['prune']:6.0f} MB/s, cp {rates['cp']:6.0f} MB/s", end="")
        print(f", ratio {ratio:.2f} (pairs: {spread}); wall {statistics.median(times['prune']):.2f} s", flush=True)
    target.unlink()
    compare_scattered(model, plan, reference, pairs)
    reference.unlink()
    reap.prune(model, output, plan, force=True)
    assert_right(model, output, plan)
    return output


def assert_right(model: Path, output: Path, plan: Path) -> None:
    """A benchmark that computes nonsense measures nothing."""
    layers, after = PrunePlan.load(plan).layers, {tensor.name: tensor for tensor in GGUFReader(output).tensors}
    for tensor in GGUFReader(model).tensors[:4]:
        layer = int(tensor.name.split(".")[1])
        for row, expert in list(enumerate(layers[layer]))[::21]:
            assert after[tensor.name].data[row].tobytes() == tensor.data[expert].tobytes()


def compare_with_numpy(model: Path, plan: Path, output: Path, repeats: int) -> None:
    """Both as processes of their own."""
    target, times, peaks = model.with_name("numpy.gguf"), {"reap": [], "numpy": []}, {}
    n_bytes = output.stat().st_size
    for _ in range(repeats):
        for name, script in (("reap", PRUNE), ("numpy", STRAIGHTFORWARD)):
            remember(model)
            target.unlink(missing_ok=True)
            os.sync()
            seconds, peaks[name], _ = run_process(sys.executable, "-c", script, model, target, plan)
            times[name].append(seconds)
    for name, label in (("reap", "reap.prune"), ("numpy", "gguf package and numpy.take")):
        seconds = statistics.median(times[name])
        print(
            f"  {label:28} {n_bytes / seconds / 1e6:6.0f} MB/s, {seconds:6.2f} s, peak {peaks[name]:6.0f} MB (whole"
            " processes)",
            flush=True,
        )
    target.unlink()


def memory(folder: Path, gigabytes: list[int]) -> None:
    """Peak of a pruning process."""
    print("\npeak resident memory of a process that prunes to a quarter, verify fast; sparse inputs")
    layer = 3 * N_EXPERTS * N_EMBD * N_FF // Q4_K_BLOCK * Q4_K_BYTES + 4 * N_EXPERTS * N_EMBD
    for size in gigabytes:
        model = write_model(folder / "sparse.gguf", max(1, round(size * 1e9 / layer)), sparse=True)
        seconds, peak, _ = run_process(
            sys.executable, "-c", PRUNE, model, folder / "small.gguf", write_plan(model, N_EXPERTS // 4)
        )
        written = (folder / "small.gguf").stat().st_size
        print(
            f"  {model.stat().st_size / 1e9:6.1f} GB -> {written / 1e9:5.2f} GB: peak {peak:5.0f} MB, {seconds:5.1f} s",
            flush=True,
        )
        (folder / "small.gguf").unlink()
        model.unlink()


def inspection(folder: Path, repeats: int) -> None:
    """Of `reap inspect` as a user runs it, and of the call."""
    print("\nreap inspect, median of the whole process, and of the call reap.inspect() in a process of its own")
    cases: list[tuple[str, int, int]] = [("151,936 tokens and as many merges", 2, 151_936), ("200 GB, sparse", 590, 0)]
    call = (
        "import sys, time; import reap; t = time.perf_counter(); reap.inspect(sys.argv[1]); print(time.perf_counter()"
        " - t)"
    )
    for label, n_layers, n_vocab in cases:
        model = write_model(folder / "inspected.gguf", n_layers, sparse=True, n_vocab=n_vocab)
        program = [run_process(sys.executable, "-m", "reap", "inspect", model) for _ in range(repeats)]
        library = [run_process(sys.executable, "-c", call, model) for _ in range(repeats)]
        print(
            f"  {label} ({model.stat().st_size / 1e9:.1f} GB): command"
            f" {statistics.median(run[0] for run in program):.2f} s, {max(run[1] for run in program):.0f} MB; call"
            f" {statistics.median(float(run[2]) for run in library):.3f} s, {max(run[1] for run in library):.0f} MB",
            flush=True,
        )
        model.unlink()


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8, help="of the model for rates; a layer is 0.34 GB")
    parser.add_argument("--quick", action="store_true", help="small, to see whether it works")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        describe_machine(folder)
        model = write_model(folder / "model.gguf", 1 if options.quick else options.layers, sparse=False)
        plan = write_plan(model, N_EXPERTS // 2)
        output = compare_with_cp(model, plan, options.pairs)
        shared = shared_bytes(output)
        print(
            "  blocks shared with the source:",
            "the file system does not say" if shared is None else f"{shared:,} bytes",
        )
        print("\nthe straightforward way, source in memory, fsync on both")
        compare_with_numpy(model, plan, output, 1 if options.quick else 3)
        for path in (model, output):
            path.unlink()
        memory(folder, [1] if options.quick else [1, 4, 16])
        inspection(folder, 3 if options.quick else 7)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
