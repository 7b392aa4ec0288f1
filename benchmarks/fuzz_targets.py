"""What `fuzz.py` feeds: how each kind of file is used, the small sound files to begin with, and the words that its
mutations are made of."""

from __future__ import annotations

import copy
import json
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
JSON_TOKENS: tuple[str, ...] = (
    '"format"', '"version"', '"model"', '"layers"', '"kept"', '"keep"', '"n_experts"', '"n_experts_used"',
    '"n_groups"', '"metric"',
    '"calibration"', '"sha256"', '"options"', '"domains"', '"counts"', '"gate_sum"', '"norm_max"', '"total_tokens"',
    "null", "true",
    "NaN", "Infinity", "-1", "1e308", "1e999", "9223372036854775808", '"\\ud800"', "[", "]", "{", "}", '"0"', '"1"',
)  # fmt: skip
GGUF_TOKENS: tuple[str, ...] = (
    "GGUF", "general.architecture", "general.alignment", "qwen3moe.expert_count", "qwen3moe.expert_used_count",
    "split.count", "split.no",
    "split.tensors.count", "reap.kept.0", "reap.source.expert_count", "blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_gate_inp.weight",
    ".in_sum2", ".counts", "imatrix.datasets", "imatrix.chunk_count",
)  # fmt: skip


TEMPLATE_TOKENS: tuple[str, ...] = (
    "{{", "}}", "{%", "%}", "{%-", "for message in messages", "endfor", "if", "elif", "else", "endif", "set", "ns",
    "namespace(", "message.content", "message['role']", "bos_token", "eos_token", "add_generation_prompt", "tools",
    "tojson", "| trim", "| length", "range(", "loop.index0", "loop.first", "raise_exception(", "strftime_now(",
    "macro m(x)", "endmacro", "generation", "endgeneration", "break", "continue", "is defined", "is string", "dict(",
    ".split(", ".items()", "__class__", "[-1]", "[::-1]", "~", " * 99999", "reasoning_content", "tool_calls",
)  # fmt: skip
MESSAGE_TOKENS: tuple[str, ...] = (
    '"role"', '"content"', '"user"', '"assistant"', '"system"', '"tool"', '"developer"', '"tool_calls"',
    '"function"', '"arguments"', '"reasoning_content"', '"type"', '"text"', '"image_url"', '"tools"', '"parameters"',
    '"messages"', '"prompt"', '"response"', '"completion"', '"conversations"', '"from"', '"value"', '"tokens"',
    '"input_ids"', '"labels"', '"domain"', '"\\ud800"', "null", "[", "]", "{", "}",
)  # fmt: skip


# ---- how a file is used


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


def use_sweep(path: Path, output: Path) -> None:
    """Load, save and load again."""
    from reap.evaluation.sweep_table import Sweep

    table = Sweep.load(path)
    for domain in (None, *table.domains):
        table.select(domain=domain)
        table.best(domain)
    table.save(output)
    Sweep.load(output)


RUN = {"model": {"fingerprint": "f"}, "options": {"ctx_size": 512}}


def use_resume(path: Path, output: Path) -> None:
    """Go on from it, and save it again."""
    from reap.profiling.resume import ResumeFile

    state = ResumeFile(path, RUN, shape=(2, 4), resume=True).state
    output.unlink(missing_ok=True)
    ResumeFile(output, RUN, shape=(2, 4), resume=False).save(state)


def use_safetensors(path: Path, _: Path) -> None:
    """Open it."""
    from reap.hf.disk.safetensors_file import SafetensorsFile

    with SafetensorsFile.open(path) as file:
        for tensor in file.tensors.values():
            file.read_range(tensor.offset_bytes, min(tensor.n_bytes, 64))


def use_index(path: Path, _: Path) -> None:
    """As the index of a checkpoint of two files."""
    from reap.hf.disk.checkpoint_files import Checkpoint

    path.replace(path.parent / "checkpoint" / "model.safetensors.index.json")
    for trust in ("shards", "index"):
        with Checkpoint.open(path.parent / "checkpoint", trust) as checkpoint:
            for tensor in checkpoint.tensors:
                checkpoint.read(tensor.name)
            checkpoint.unnamed_files  # noqa: B018


def use_template(path: Path, _: Path) -> None:
    """Compile it, and render a conversation of each kind."""
    from reap.text.chat_template import ChatTemplate

    source = path.read_bytes().decode("utf-8", "replace")
    template = ChatTemplate(source, origin="fuzzed", bos="<s>", eos="</s>")
    template.render(CONVERSATION, add_generation_prompt=True)
    template.read(CONVERSATION, tools=TOOLS, turns=True)


def use_messages(path: Path, _: Path) -> None:
    """As the lines of a calibration, each rendered where it is a conversation."""
    from reap.text.samples import SampleReader

    template = our_template()
    for sample in SampleReader(str(path), skip_bad_lines=True):
        if sample.messages:
            template.read(sample.messages, tools=sample.tools, turns=True)


@cache
def our_template() -> Any:
    """A template that takes all that a conversation may have."""
    from reap.text.chat_template import ChatTemplate

    return ChatTemplate(TEMPLATE, origin="ours", bos="<s>", eos="</s>")


TEMPLATE = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>
{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for call in
m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "rule"},
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
    {"role": "assistant", "content": None, "reasoning_content": "thought", "tool_calls": [CALL]},
    {"role": "tool", "content": "result", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "answer"},
]


# ---- seeds


def small_model(path: Path, **changes: Any) -> Path:
    """A MoE of about 3 KB."""
    from helpers.gguf_builder import build_moe

    sizes: dict[str, Any] = dict(
        n_layers=1, n_experts=4, n_embd=4, n_ff=4, n_heads=1, n_heads_kv=1, n_head_dim=4, n_vocab=4
    )
    return build_moe(path, **{**sizes, **changes})


def seed_models(directory: Path) -> None:
    """Whole models."""
    for index, changes in enumerate(
        ({}, {"biases": True, "selection_bias": True, "tokenizer": "words"}, {"fused": True}, {"n_experts": 0})
    ):
        small_model(directory / f"seed{index}", **changes)


def seed_split(directory: Path) -> None:
    """The first of two shards."""
    from gguf import GGUFValueType

    keys = {f"split.{name}": (GGUFValueType.UINT16, value) for name, value in (("no", 0), ("count", 2))}
    small_model(directory / "seed", keys=keys)


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


def seed_plan(directory: Path) -> None:
    """With protected experts."""
    from helpers.profiles import make_profile
    from reap.scores.plan import plan

    plan(make_profile(1, layers=(0,), n_experts=4, domains=("a", "b")), keep=2, protect="0:1").save(directory / "seed")


def seed_profiles(directory: Path) -> None:
    """With domains and without, and one of the reference profiler."""
    from helpers.profiles import make_profile, reference_document

    make_profile(1, layers=(0,), n_experts=4, domains=("a", "b")).save(directory / "seed")
    make_profile(2, layers=(0,), n_experts=4).save(directory / "seed2")
    (directory / "seed3").write_text(json.dumps(reference_document()), encoding="utf-8")


def seed_sweep(directory: Path) -> None:
    """With a domain, a verdict and a target."""
    from reap.evaluation.sweep_table import Sweep, SweepRow, Target, Verdict

    def row(metric: str, keep: int, **more: Any) -> SweepRow:
        values: dict[str, Any] = dict(
            seed=None, bytes=1000, perplexity=10.0, stderr=0.5, kl_mean=0.1, top1=0.9, loss_increase=0.1,
            loss_increase_stderr=0.01, domain=None, tokens=100,
        )  # fmt: skip
        return SweepRow(metric=metric, keep=keep, **(values | more))

    verdict = Verdict(keep=2, domain=None, metric="reap", runner_up="random", margin=0.2, spread=0.05, clear=True)
    target = Target(kind="size", limit=5000.0, metric="reap", keep=2, bytes=900, perplexity=12.0)
    rows = (row("baseline", 4), row("baseline", 4, domain="c"), row("reap", 2), row("random", 2, seed=0))
    calibration = {"files": ["c.txt"], "sha256": ["0" * 64]}
    model = {"name": "tiny", "n_experts": 4, "bytes": 2000}
    Sweep(rows, (verdict,), (target,), model, {"files": ["t.txt"]}, calibration, {}, True, ("note",)).save(
        directory / "seed"
    )


def seed_resume(directory: Path) -> None:
    """Of a run of two domains that failed once."""
    import numpy as np

    from reap.profiling.resume import ResumeFile, State
    from reap.scores.records import SUMS

    counts = np.array([[1, 2, 0, 1], [0, 0, 4, 0]])
    group: dict[str, Any] = {"total_tokens": np.array([4, 4]), "counts": counts}
    group |= {name: counts * 0.5 for name in SUMS}
    group["norm_max"] = (counts > 0) * 0.5
    state = State(3, "0" * 64, [("a", 0), (None, 3)], [group, group], {1: "line 2: why"})
    (directory / "seed").unlink(missing_ok=True)
    ResumeFile(directory / "seed", RUN, shape=(2, 4), resume=False).save(state)


def seed_safetensors(directory: Path) -> None:
    """Small files of several types."""
    from helpers.checkpoint_builder import write_file

    write_file(directory / "seed", {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("U8", ()), "d": ("F8_E4M3", (3,))})
    write_file(directory / "seed2", {})


INDEXED = {"a": ("F32", (2,)), "b": ("F32", (2,)), "c": ("F32", (2,))}


def seed_index(directory: Path) -> None:
    """Of two files."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    document = {"metadata": {"total_size": 24}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (directory / "seed").write_text(json.dumps(document))


def prepare_index(directory: Path) -> None:
    """The checkpoint that the index belongs to."""
    from helpers.checkpoint_builder import build, write_file

    build(directory / "checkpoint", {"a": ("F32", (2,))}, {"model_type": "qwen3_moe"})
    (directory / "checkpoint" / "model.safetensors").unlink()
    for number, names in ((1, "ab"), (2, "c")):
        path = directory / "checkpoint" / f"model-{number:05}-of-00002.safetensors"
        write_file(path, {name: INDEXED[name] for name in names})


def seed_templates(directory: Path) -> None:
    """Ours, and one that uses more of the language."""
    (directory / "seed").write_text(TEMPLATE)
    (directory / "seed2").write_text(
        "{%- set ns = namespace(last=0) %}{% macro say(x) %}{{ x | trim }}{% endmacro %}{%- for m in messages[::-1] %}"
        "{% if loop.first %}{% set ns.last = loop.index0 %}{% endif %}{% if m.content is string %}{{ say(m.content) }}"
        "{% else %}{{ m.content | tojson(indent=2) }}{% endif %}{% endfor %}{% generation %}{{ ns.last }}"
        "{% endgeneration %}{{ strftime_now('%d %b %Y') }}{{ 'a,b'.split(',') | join('-') | upper }}"
    )


def seed_messages(directory: Path) -> None:
    """Conversations and the other shapes of a line."""
    lines: list[dict[str, Any]] = [
        {"messages": CONVERSATION, "tools": TOOLS, "domain": "code"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "response": "b"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"text": "a"},
        {"tokens": [1, 2, 3]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    (directory / "seed").write_text("\n".join(map(json.dumps, lines)))
    for number, line in enumerate(lines):
        (directory / f"seed{number}").write_text(json.dumps(line))


# ---- mutations that keep the form of a file

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 2**31, 2**63, 10**400, 0.5, -0.0, -0.5, 1e308, 5e-324, "", "x", "1", [], {}, [1], [[]],
    [None], "\ud800",
    {"a": 1}, {"1": {}},
)  # fmt: skip


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """One to three values of the document replaced, dropped or moved; where it is not JSON, and every third time, bytes
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


def mutate_header(data: bytes, max_size: int, seed: int) -> bytes:
    """The header of a safetensors file as `mutate_json` does, with its length put right; bytes every third time."""
    import atheris

    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if seed % 3 == 0 or not 0 < length <= len(data) - 8:
        return bytes(atheris.Mutate(data, max_size))
    header = mutate_json(data[8 : 8 + length], max(max_size - 8, 1), seed)
    return (struct.pack("<Q", len(header)) + header + data[8 + length :])[:max_size]


def nothing(_: Path) -> None:
    """No more files are needed than the input."""


@dataclass(frozen=True)
class Target:
    """One kind of file.

    share: of all runs. use: called with the input and a path to write to. seed: fills the corpus. name: of the input.
    prepare: writes what has to lie beside the input.
    """

    share: float
    use: Callable[[Path, Path], None]
    seed: Callable[[Path], None]
    tokens: tuple[str, ...] = JSON_TOKENS
    mutate: Callable[[bytes, int, int], bytes] | None = None
    name: str = "input"
    prepare: Callable[[Path], None] = nothing


TARGETS = {
    "gguf": Target(0.2, use_model, seed_models, GGUF_TOKENS),
    "split": Target(0.03, use_model, seed_split, GGUF_TOKENS, name="m-00001-of-00002.gguf", prepare=second_shard),
    "imatrix": Target(0.13, use_imatrix, seed_matrices, GGUF_TOKENS),
    "plan": Target(0.15, use_plan, seed_plan, mutate=mutate_json),
    "profile": Target(0.15, use_profile, seed_profiles, mutate=mutate_json),
    "sweep": Target(0.1, use_sweep, seed_sweep, mutate=mutate_json),
    "resume": Target(0.08, use_resume, seed_resume, mutate=mutate_json),
    "safetensors": Target(0.1, use_safetensors, seed_safetensors, mutate=mutate_header),
    "index": Target(0.03, use_index, seed_index, mutate=mutate_json, prepare=prepare_index),
    "template": Target(0.01, use_template, seed_templates, TEMPLATE_TOKENS),
    "messages": Target(0.02, use_messages, seed_messages, MESSAGE_TOKENS, mutate=mutate_json, name="input.jsonl"),
}
