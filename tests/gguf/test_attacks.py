"""A stranger's files, through every door: each attack ends in one ReapError within a second and 200 MB, and nothing is
written or run.

The attacks on the header itself are in test_reader.py and are sent through here once more; those on importance matrices
in test_imatrix.py. benchmarks/fuzz.py looks for more of them.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reader import ARRAY, ATTACKS, STRING, UINT32, array, pair, raw_file, text

import reap
from gguf import GGUFValueType
from helpers.gguf_builder import build_moe
from helpers.profiles import make_profile, reference_document
from reap.cli import main
from reap.engine import native
from reap.errors import FormatError, ReapError
from reap.files import regular
from reap.gguf import reader
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile

Maker = Callable[[Path], Path]
MOST_BYTES = 200 << 20


@contextmanager
def bounded() -> Iterator[None]:
    """A second of this process's time, and 200 MB more than before at most."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < MOST_BYTES


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets as far as the native module has got too far."""

    def load() -> None:
        raise AssertionError("an attack reached the native module")

    monkeypatch.setattr(native, "load", load)


# ---- models


def bytes_file(content: bytes) -> Maker:
    def make(folder: Path) -> Path:
        (folder / "m.gguf").write_bytes(content)
        return folder / "m.gguf"

    return make


def model(**changes: Any) -> Maker:
    return lambda folder: build_moe(folder / "m.gguf", **changes)


def patched(old: bytes, new: bytes, **changes: Any) -> Maker:
    """A sound model in which some bytes are others."""

    def make(folder: Path) -> Path:
        path = build_moe(folder / "m.gguf", **changes)
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        return path

    return make


def sparse(n_bytes: int, *pairs: bytes) -> Maker:
    """A header that claims, and a file that is large enough."""

    def make(folder: Path) -> Path:
        path = bytes_file(raw_file(pairs))(folder)
        os.truncate(path, n_bytes)
        return path

    return make


def number(key: str, value: int) -> tuple[bytes, bytes]:
    prefix = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", UINT32)
    return prefix, prefix + struct.pack("<I", value)


def with_count(key: str, old: int, new: int, **changes: Any) -> Maker:
    prefix, value = number(key, new)
    return patched(prefix + struct.pack("<I", old), value, **changes)


ARCHITECTURE = pair(b"general.architecture", STRING, text(b"qwen3moe"))
LARGE = 1 << 30
KEPT_4 = (GGUFValueType.ARRAY, [0, 1, 2, 3])

MODELS: dict[str, Maker] = {
    **{f"header: {name}": bytes_file(content) for name, (content, _) in ATTACKS.items()},
    "no architecture": bytes_file(raw_file()),
    "an architecture of a gigabyte": sparse(
        LARGE + 4096, pair(b"general.architecture", STRING, struct.pack("<Q", LARGE))
    ),
    "a name of 80 MiB": sparse(LARGE, ARCHITECTURE, pair(b"general.name", STRING, struct.pack("<Q", 80 << 20))),
    "a header of more than it may take": sparse(LARGE, ARCHITECTURE, pair(b"x", ARRAY, array(UINT32, 60 << 20))),
    "more strings than any vocabulary": sparse(LARGE, ARCHITECTURE, pair(b"x", ARRAY, array(STRING, 3_000_000))),
    "provenance of 80 MiB": sparse(LARGE, ARCHITECTURE, pair(b"reap.kept.0", ARRAY, array(0, 80 << 20))),
    "a text of provenance of 80 MiB": sparse(
        LARGE, ARCHITECTURE, pair(b"reap.metric", STRING, struct.pack("<Q", 80 << 20))
    ),
    "experts beyond counting": with_count("qwen3moe.expert_count", 8, 2**32 - 1),
    "no experts in the header": with_count("qwen3moe.expert_count", 8, 0),
    "one expert too many": with_count("qwen3moe.expert_count", 8, 9),
    "blocks beyond counting": with_count("qwen3moe.block_count", 2, 2**32 - 1),
    "more experts used than there are": with_count("qwen3moe.expert_used_count", 2, 9),
    "no experts used": with_count("qwen3moe.expert_used_count", 2, 0),
    "groups that do not divide": with_count("qwen3moe.expert_group_count", 2, 3, n_groups=2, n_groups_used=1),
    "groups beyond counting": with_count("qwen3moe.expert_group_count", 2, 2**32 - 1, n_groups=2, n_groups_used=1),
    "a negative count": model(keys={"qwen3moe.nextn_predict_layers": (GGUFValueType.INT32, -1)}),
    "a count that is a text": model(keys={"qwen3moe.nextn_predict_layers": (GGUFValueType.STRING, "1")}),
}


def split_model(folder: Path, *, shards: int = 2, **changes: Any) -> list[Path]:
    """A sound split model of `shards` shards."""
    source = build_moe(folder / "whole.gguf", **changes)
    info = reap.inspect(source)
    plan = PrunePlan({"n_experts": 8}, "reap", 8, dict.fromkeys(info.moe_layers, tuple(range(8))))
    report = reap.prune(source, folder / "m.gguf", plan, split_max_size=source.stat().st_size // shards + 4000)
    source.unlink()
    assert len(report.files) == shards
    return list(report.files)


def edited_split(edit: Callable[[list[Path]], object]) -> Maker:
    def make(folder: Path) -> Path:
        files = split_model(folder)
        edit(files)
        return files[0]

    return make


def swap(files: list[Path]) -> None:
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def relink(files: list[Path]) -> None:
    files[1].unlink()
    files[1].symlink_to(files[0].name)


def link_in_a_circle(files: list[Path]) -> None:
    files[1].unlink()
    files[1].symlink_to(files[1].name)


def pipe(files: list[Path]) -> None:
    files[1].unlink()
    os.mkfifo(files[1])


def edit_key(which: int, key: str, new: bytes) -> Callable[[list[Path]], object]:
    """Replace type and value of a key of one shard."""

    def edit(files: list[Path]) -> None:
        content = files[which].read_bytes()
        start = content.index(key.encode()) + len(key)
        files[which].write_bytes(content[:start] + new + content[start + len(new) :])

    return edit


def duplicate(files: list[Path]) -> None:
    content = files[0].read_bytes().replace(struct.pack("<H", 0), struct.pack("<H", 0))
    start = content.index(b"split.no") + len("split.no") + 4
    files[1].write_bytes(content[:start] + struct.pack("<H", 1) + content[start + 2 :])


U16, I32 = struct.pack("<I", 2), struct.pack("<I", 5)
SPLITS: dict[str, Maker] = {
    "a shard that is missing": edited_split(lambda files: files[1].unlink()),
    "shards in each other's place": edited_split(swap),
    "a shard that is the first once more": edited_split(relink),
    "a shard that is a link to itself": edited_split(link_in_a_circle),
    "a shard that is a pipe": edited_split(pipe),
    "a shard that is a directory": edited_split(lambda files: (files[1].unlink(), files[1].mkdir())),
    "a shard that is empty": edited_split(lambda files: files[1].write_bytes(b"")),
    "a shard that is cut off": edited_split(lambda files: os.truncate(files[1], files[1].stat().st_size - 1)),
    "65,535 shards": edited_split(edit_key(0, "split.count", U16 + struct.pack("<H", 65_535))),
    "no shards": edited_split(edit_key(1, "split.count", U16 + struct.pack("<H", 0))),
    "a number beyond the count": edited_split(edit_key(1, "split.no", U16 + struct.pack("<H", 2))),
    "two first shards": edited_split(edit_key(1, "split.no", U16 + struct.pack("<H", 0))),
    "a count of tensors that is wrong": edited_split(edit_key(0, "split.tensors.count", I32 + struct.pack("<i", 3))),
    "a negative count of tensors": edited_split(edit_key(0, "split.tensors.count", I32 + struct.pack("<i", -1))),
    "a count that is a real number": edited_split(edit_key(0, "split.tensors.count", struct.pack("<If", 6, 2.5))),
    "tensors twice": edited_split(duplicate),
}


def doors(path: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """All that takes a model."""
    plan = PrunePlan({"n_experts": 8}, "reap", 4, {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)})
    return {
        "inspect": lambda: reap.inspect(path),
        "prune": lambda: reap.prune(path, folder / "out.gguf", plan),
        "profile": lambda: reap.profile(path, [{"text": "a"}]),
    }


@pytest.mark.parametrize("attack", [*MODELS, *SPLITS])
def test_a_hostile_model_is_refused_at_every_door(
    tmp_path: Path, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = (MODELS | SPLITS)[attack](tmp_path)
    before = sorted(tmp_path.iterdir())
    for call in doors(path, tmp_path).values():
        with bounded(), pytest.raises(ReapError) as caught:
            call()
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)
    assert main(["inspect", str(path)]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["..-00001-of-00002.gguf", "a\n-00001-of-00002.gguf", "%s%n-00001-of-00002.gguf", "-00001-of-00002.gguf"]
)
def test_names_of_shards_lead_nowhere_else(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = split_model(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(files[0].read_bytes())
    opened: list[Path] = []
    real = regular.open_regular
    for module in (regular, reader):
        monkeypatch.setattr(module, "open_regular", lambda path, what: (opened.append(path), real(path, what))[1])
    with pytest.raises(FormatError, match=r"is missing|others cannot be found"):
        reap.inspect(folder / name)
    assert {path.parent for path in opened} == {folder}


def test_a_shard_count_in_the_name_alone_opens_nothing(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "m-00001-of-99999.gguf")
    with bounded():
        assert reap.inspect(path).n_files == 1


# ---- plans and profiles


def plan_document() -> dict[str, Any]:
    return reap.plan(make_profile(layers=(0, 1)), keep=4).to_dict()


def profile_document() -> dict[str, Any]:
    return make_profile(layers=(0, 1), domains=("a", "b")).to_dict()


def changed(make: Callable[[], dict[str, Any]], *path: Any, to: Any) -> str:
    document: Any = json.loads(json.dumps(make()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return json.dumps(document)


LAYER = ("layers", "0")
JSON_ATTACKS: dict[str, str | bytes] = {
    "empty": "",
    "a list": "[]",
    "a number": "1",
    "not text": b"\xff\xfe\x00",
    "a pickle": (
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
    ),
    "a hundred thousand brackets": "[" * 100_000,
    "a hundred thousand objects": '{"a":' * 100_000,
    "a key twice": '{"format": "reap.plan", "format": "reap.profile"}',
    "a number of a million digits": '{"format": ' + "9" * 1_000_000 + "}",
    "an exponent beyond all doubles": '{"format": 1e999999999}',
    "nothing but commas": "{" + "," * 1_000_000,
    "a hundred million bytes": b'{"format": "' + b"a" * 100_000_000,
    "a million empty lists": '{"format": [' + "[]," * 1_000_000 + "0]}",
    "a million keys": "{" + ",".join(f'"{key}":0' for key in range(1_000_000)) + "}",
    "as many numbers as there may be": (
        '{"format": "reap.profile", "version": 1, "layers": [' + "0," * (1 << 22) + "0]}"
    ),
    "as many zeros as there may be bytes": (
        '{"format": "reap.profile", "version": 1, "layers": 0.' + "0" * (75 << 20) + "}"
    ),
}
PLANS: dict[str, str | bytes] = {
    **JSON_ATTACKS,
    "another format": changed(plan_document, "format", to="reap.profile"),
    "a version to come": changed(plan_document, "version", to=2**70),
    "an expert that is not there": changed(plan_document, *LAYER, "kept", to=[0, 1, 2, 8]),
    "a negative expert": changed(plan_document, *LAYER, "kept", to=[-1, 0, 1, 2]),
    "an expert twice": changed(plan_document, *LAYER, "kept", to=[0, 1, 1, 2]),
    "an expert beyond 64 bits": changed(plan_document, *LAYER, "kept", to=[0, 1, 2, 2**64]),
    "an expert that is half": changed(plan_document, *LAYER, "kept", to=[0, 1, 2, 2.5]),
    "an expert that is true": changed(plan_document, *LAYER, "kept", to=[0, 1, 2, True]),
    "an expert that is not a number": changed(plan_document, *LAYER, "kept", to=[0, 1, 2, float("nan")]),
    "a million experts": changed(plan_document, *LAYER, "kept", to=list(range(1_000_000))),
    "experts beyond counting": changed(plan_document, "model", "n_experts", to=10**18),
    "no experts": changed(plan_document, "model", "n_experts", to=0),
    "keep beyond all": changed(plan_document, "keep", to=10**30),
    "keep nothing": changed(plan_document, "keep", to=0),
    "a layer that is none": changed(plan_document, "layers", "-1", to={"kept": [0, 1, 2, 3]}),
    "a layer twice": changed(plan_document, "layers", "00", to={"kept": [0, 1, 2, 3]}),
    "a layer beyond counting": changed(plan_document, "layers", str(10**30), to={"kept": [0, 1, 2, 3]}),
    "groups that do not divide": changed(plan_document, "model", "n_groups", to=3),
    "groups beyond counting": changed(plan_document, "model", "n_groups", to=10**18),
    "a fingerprint that is a list": changed(plan_document, "model", "fingerprint", to=[]),
    "larger than any": '{"format": "reap.plan", "x": "' + "a" * (9 << 20) + '"}',
}
PROFILES: dict[str, str | bytes] = {
    **JSON_ATTACKS,
    "another format": changed(profile_document, "format", to="reap.plan"),
    "NaN": changed(profile_document, *LAYER, "gated_norm_sum", to=[float("nan")] * 8),
    "infinity": changed(profile_document, *LAYER, "gated_norm_sum", to=[float("inf")] * 8),
    "negative sums": changed(profile_document, *LAYER, "gate_sum", to=[-1.0] * 8),
    "negative counts": changed(profile_document, *LAYER, "activation_counts", to=[-1] * 8),
    "counts beyond 64 bits": changed(profile_document, *LAYER, "activation_counts", to=[2**64] * 8),
    "counts that are half": changed(profile_document, *LAYER, "activation_counts", to=[0.5] * 8),
    "sums without counts": changed(profile_document, *LAYER, "activation_counts", to=[0] * 8),
    "too few experts": changed(profile_document, *LAYER, "norm_sum", to=[1.0]),
    "too many experts": changed(profile_document, *LAYER, "norm_sum", to=[1.0] * 100_000),
    "experts beyond counting": changed(profile_document, "model", "n_experts", to=10**18),
    "tokens beyond counting": changed(profile_document, *LAYER, "total_tokens", to=10**30),
    "a layer that is none": changed(profile_document, "layers", "x", to={}),
    "layers that are a text": changed(profile_document, "layers", to="all"),
    "domains of nothing": changed(profile_document, "domains", "a", to={}),
    "domains that are more than the whole": changed(
        profile_document, "domains", "c", to={"layers": profile_document()["layers"]}
    ),
}


@pytest.mark.parametrize(
    ("kind", "attack"), [("plan", name) for name in PLANS] + [("profile", name) for name in PROFILES]
)
def test_a_hostile_plan_or_profile_is_refused(
    tmp_path: Path, kind: str, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (PLANS if kind == "plan" else PROFILES)[attack]
    path = tmp_path / "x.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    model_path = build_moe(tmp_path / "m.gguf")
    before = sorted(tmp_path.iterdir())
    load: Callable[[Path], object] = PrunePlan.load if kind == "plan" else Profile.load
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bounded(), pytest.raises(FormatError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) < 1000
        command = ["--plan", str(path)] if kind == "plan" else ["--profile", str(path), "--keep", "4"]
        assert main(["prune", str(model_path), *command, "-o", str(tmp_path / "out.gguf")]) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


# ---- anything at all in the place of anything

STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, "", "1", "\ud800", [], {}, [[]], {"1": {}}]
    ),
    st.recursive(
        st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document; of lists the first few."""
    keys = (
        list(document)
        if isinstance(document, dict)
        else list(range(min(4, len(document))))
        if isinstance(document, list)
        else []
    )
    found = [(document, key) for key in keys]
    return found + [place for key in keys for place in places(document[key])]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["plan", "profile", "reference"])
@given(data=st.data())
def test_no_value_in_a_plan_or_profile_can_do_worse_than_an_error(tmp_path: Path, kind: str, data: Any) -> None:
    make = {"plan": plan_document, "profile": profile_document, "reference": reference_document}[kind]
    document = json.loads(json.dumps(make()))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(document)))
        if data.draw(st.integers(0, 3)):
            container[key] = data.draw(STRANGE)
        else:
            del container[key]
        if not places(document):
            break
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with warnings.catch_warnings(), suppress(ReapError):
        warnings.simplefilter("ignore")
        if kind == "plan":
            PrunePlan.load(path).to_dict()
        else:
            profile = Profile.load(path)
            reap.plan(profile, keep=4 if kind == "profile" else 2).to_dict()
            reap.merge([profile, profile])


# ---- nothing is ever unpickled


def test_nothing_is_unpickled_or_evaluated() -> None:
    package = Path(reap.__file__).parent
    # llama.cpp's own converter lies in the installed package; it runs in a process of its own, on checkpoints alone
    for path in (path for path in package.rglob("*.py") if "_converter" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "np.load",
                    "numpy.load",
                    "torch.load",
                ), f"{path}:{node.lineno} {called}"
