"""Coverage-guided fuzzing of everything that reads a stranger's file: GGUF models and splits, importance matrices,
plans, profiles.

    pip install atheris
    python benchmarks/fuzz.py [--runs 1000000] [--targets gguf,split,imatrix,plan,profile] [--corpus DIR]

Each input may end in a `ReapError` or in success, within a second and 200 MB; anything else is a crash, kept as
`crash-*` in the corpus folder. What opens is used as a user would use it: inspected, planned for, pruned as a dry run.
The runs are shared out among the targets, which run one after the other; a summary of inputs, seconds, slowest input
and peak memory comes last.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
PACKAGE = TESTS.parent / "python"
# how much of the runs each target gets
SHARES = {"gguf": 0.4, "split": 0.1, "imatrix": 0.1, "plan": 0.2, "profile": 0.2}
MAX_INPUT_BYTES = 16_384
TIMEOUT_SECONDS = 1
# of the whole process, the interpreter, numpy and the fuzzer's own tables included
MEMORY_LIMIT_MB = 200
JSON_TOKENS = (
    '"format"', '"version"', '"model"', '"layers"', '"kept"', '"keep"', '"n_experts"', '"n_experts_used"',
    '"n_groups"', '"metric"',
    '"calibration"', '"sha256"', '"options"', '"domains"', '"counts"', '"gate_sum"', '"norm_max"', '"total_tokens"',
    "null", "true",
    "NaN", "Infinity", "-1", "1e308", "1e999", "9223372036854775808", '"\\ud800"', "[", "]", "{", "}", '"0"', '"1"',
)  # fmt: skip
GGUF_TOKENS = (
    "GGUF", "general.architecture", "general.alignment", "qwen3moe.expert_count", "qwen3moe.expert_used_count",
    "split.count", "split.no",
    "split.tensors.count", "reap.kept.0", "reap.source.expert_count", "blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_gate_inp.weight",
    ".in_sum2", ".counts", "imatrix.datasets", "imatrix.chunk_count",
)  # fmt: skip


# ---- one target in this process


def use_model(path: Path, output: Path) -> None:
    """Inspect, plan and prune (dry) what the input claims to be."""
    import reap
    from reap.scores.plan import PrunePlan

    info = reap.inspect(path)
    info.to_dict()
    if info.is_moe and info.n_experts > 1:
        kept = tuple(range(info.n_experts // 2))
        model = {"n_experts": info.n_experts, "fingerprint": info.fingerprint}
        plan = PrunePlan(model, "reap", len(kept), dict.fromkeys(info.moe_layers, kept))
        reap.prune(path, output, plan, dry_run=True)


def use_plan(path: Path, output: Path) -> None:
    """Load, save and load again."""
    from reap.scores.plan import PrunePlan

    PrunePlan.load(path).save(output)
    PrunePlan.load(output)


def use_profile(path: Path, output: Path) -> None:
    """Load, score, plan, merge, save."""
    import reap

    profile = reap.Profile.load(path)
    for metric in ("reap", "frequency", "random"):
        profile.score(metric)
    reap.plan(profile, keep=0.5).save(output)
    reap.merge([profile, profile])


def use_imatrix(path: Path, _: Path) -> None:
    """Cut it as if for a model of 4 experts."""
    from reap.gguf.imatrix import Experts, read_imatrix

    with read_imatrix(path) as matrix:
        names = [name for name in matrix.entries if "_exps" in name] or ["blk.0.ffn_gate_exps.weight"]
        matrix.cut(dict.fromkeys(names, Experts(4, 4, (0, 2)))).n_bytes  # noqa: B018


USES: dict[str, Callable[[Path, Path], None]] = {
    "gguf": use_model,
    "split": use_model,
    "imatrix": use_imatrix,
    "plan": use_plan,
    "profile": use_profile,
}


def fuzz(target: str, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    # an editable install brings a loader of its own, which atheris cannot look through
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, str(PACKAGE))
    with atheris.instrument_imports(include=["reap"]):
        pass
    from reap.errors import ReapError

    warnings.simplefilter("ignore")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = directory / ("m-00001-of-00002.gguf" if target == "split" else "input")
    if target == "split":
        second_shard(directory)
    use, output = USES[target], directory / "output"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            use(path, output)
        except ReapError:
            return

    mutator = {"custom_mutator": mutate_json} if target in ("plan", "profile") else {}
    atheris.Setup([sys.argv[0], *arguments], one, **mutator)
    atheris.Fuzz()


# ---- JSON that stays JSON

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 2**31, 2**63, 10**400, 0.5, -0.0, -0.5, 1e308, 5e-324, "", "x", "1", [], {}, [1], [[]],
    [None], "\ud800",
    {"a": 1}, {"1": {}},
)  # fmt: skip


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """One to three values of the document replaced, dropped or moved; where it is no JSON, and every third time, bytes
    changed."""
    import atheris

    rng = random.Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if document is None or seed % 3 == 0:
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(rng.randint(1, 3)):
        replace_one(document, rng)
    return json.dumps(document).encode()[:max_size]


def replace_one(document: Any, rng: random.Random) -> None:
    """Change one member of one object or list of the document."""
    places = [container for container in containers(document) if container]
    if not places:
        return
    place = rng.choice(places)
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    choice = rng.random()
    if choice < 0.6:
        place[key] = copy.deepcopy(rng.choice(VALUES))
    elif choice < 0.75:
        del place[key]
    elif isinstance(place, dict):
        place[rng.choice(("0", "9", "01", "a", "", "fingerprint", "n_groups"))] = place[key]
    else:
        place.append(copy.deepcopy(place[key]))


def containers(document: Any) -> Iterator[Any]:
    """Every object and list of it."""
    if isinstance(document, dict | list):
        yield document
        for member in document.values() if isinstance(document, dict) else document[:8]:
            yield from containers(member)


# ---- seeds


def seeds(target: str, directory: Path) -> None:
    """Small sound files to start from."""
    sys.path.insert(0, str(TESTS))
    if target in ("gguf", "split"):
        seed_models(target, directory)
    elif target == "imatrix":
        seed_matrices(directory)
    else:
        seed_json(target, directory)


def small_model(path: Path, **changes: Any) -> Path:
    """A MoE of about 3 KB."""
    from helpers.gguf_builder import build_moe

    sizes: dict[str, Any] = dict(
        n_layers=1, n_experts=4, n_embd=4, n_ff=4, n_heads=1, n_heads_kv=1, n_head_dim=4, n_vocab=4
    )
    return build_moe(path, **{**sizes, **changes})


def seed_models(target: str, directory: Path) -> None:
    """Whole models, or the first of two shards."""
    if target == "split":
        first_shard(directory / "seed")
        return
    for index, changes in enumerate(
        ({}, {"biases": True, "selection_bias": True, "tokenizer": "words"}, {"fused": True}, {"n_experts": 0})
    ):
        small_model(directory / f"seed{index}", **changes)


def first_shard(path: Path) -> None:
    """Of two."""
    from gguf import GGUFValueType

    small_model(
        path, keys={f"split.{name}": (GGUFValueType.UINT16, value) for name, value in (("no", 0), ("count", 2))}
    )


def second_shard(directory: Path) -> None:
    """The other of two, with one tensor."""
    import numpy as np

    sys.path.insert(0, str(TESTS))
    from gguf import GGUFWriter

    writer = GGUFWriter(str(directory / "m-00002-of-00002.gguf"), "qwen3moe")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("output.weight.2", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seed_matrices(directory: Path) -> None:
    """Both forms."""
    from helpers.imatrices import write_gguf_imatrix, write_legacy_imatrix

    entries = {"blk.0.ffn_gate_exps.weight": (4, 4), "blk.0.ffn_down_exps.weight": (4, 4), "output.weight": (1, 4)}
    write_gguf_imatrix(directory / "seed.gguf", entries)
    write_legacy_imatrix(directory / "seed.dat", entries)


def seed_json(target: str, directory: Path) -> None:
    """A plan, or profiles with and without domains and one of the reference profiler."""
    from helpers.profiles import make_profile, reference_document
    from reap.scores.plan import plan

    small = make_profile(1, layers=(0,), n_experts=4, domains=("a", "b"))
    if target == "plan":
        plan(small, keep=2, protect="0:1").save(directory / "seed")
        return
    small.save(directory / "seed")
    make_profile(2, layers=(0,), n_experts=4).save(directory / "seed2")
    (directory / "seed3").write_text(json.dumps(reference_document()), encoding="utf-8")


# ---- all targets, one after the other


def run_target(target: str, runs: int, corpus: Path, seconds: int) -> dict[str, Any]:
    """What libFuzzer says of it in the end."""
    folder = corpus / target
    folder.mkdir(parents=True, exist_ok=True)
    seeds(target, folder)
    words = folder.with_suffix(".dict")
    tokens = JSON_TOKENS if target in ("plan", "profile") else GGUF_TOKENS
    words.write_text("".join('"' + re.sub(r'(["\\])', r"\\\1", token) + '"\n' for token in tokens), encoding="utf-8")
    options = [
        f"-runs={runs}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={TIMEOUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_LIMIT_MB}",
    ]
    options += [
        f"-dict={words}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-max_total_time={seconds}",
    ]
    command = [sys.executable, __file__, "--one", target, *options, str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    figures: dict[str, Any] = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    figures |= {"seconds": time.perf_counter() - started, "exit": done.returncode, "log": done.stderr}
    return figures


def main() -> int:
    """Exit code 1 where a target crashed, hung or grew."""
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, all targets together")
    parser.add_argument("--seconds", type=int, default=0, help="most time for one target; 0: no limit")
    parser.add_argument("--targets", default=",".join(SHARES))
    parser.add_argument("--corpus", type=Path, help="where inputs are kept from run to run; forgotten otherwise")
    options = parser.parse_args()
    targets = options.targets.split(",")
    whole = sum(SHARES[target] for target in targets)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, total, failed = options.corpus or Path(scratch), 0, False
        print(
            f"{'target':10} {'inputs':>10} {'seconds':>8} {'per second':>10} {'slowest s':>9} {'peak MB':>8}",
            flush=True,
        )
        for target in targets:
            figures = run_target(target, round(options.runs * SHARES[target] / whole), corpus, options.seconds)
            inputs, seconds = figures.get("number_of_executed_units", 0), figures["seconds"]
            total += inputs
            slowest, peak = figures.get("slowest_unit_time_sec", "?"), figures.get("peak_rss_mb", "?")
            print(
                f"{target:10} {inputs:10,} {seconds:8.0f} {inputs / seconds:10,.0f} {slowest:>9} {peak:>8}", flush=True
            )
            if figures["exit"]:
                failed = True
                print(figures["log"][-3000:], file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"{total:,} inputs in all; the largest process took {peak} MB; {'FAILED' if failed else 'no crash, no hang'}")
    print(f"on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
