"""The command line: options reach the library, exit codes, and what goes to stdout and to stderr."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.profiles import make_profile, reference_document
from reap.cli import demonstration, main, show
from reap.cli.options import parse_keep, split_list
from reap.errors import Interrupted, UsageError
from reap.progress import Progress
from reap.scores.profile import Profile

COMMANDS = (
    "inspect", "profile", "merge", "compare", "plan", "prune", "evaluate", "report", "card", "convert", "quantize",
    "devices", "shrink",
    "rpc-server", "demo", "hf profile", "hf prune",
)  # fmt: skip


class Recorder:
    """Stands in for a function of the library and remembers the call."""

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments, self.options = arguments, options
        if self.error is not None:
            raise self.error
        return self.result


def record(
    monkeypatch: pytest.MonkeyPatch, name: str, result: Any = None, error: BaseException | None = None
) -> Recorder:
    recorder = Recorder(result, error)
    monkeypatch.setattr(reap, name, recorder)
    return recorder


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    return make_profile(1).save(tmp_path / "p.json")


# ---- help and version


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[0] == f"reap {reap.__version__}"
    )  # what follows: tests/project/test_first_contact.py


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert main([*command.split(), flag]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-2:]
        assert f"Example: reap {command}" in " ".join(last)


def test_every_example_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reap.cli.app import app

    monkeypatch.chdir(tmp_path)
    make_profile().save("model.reap.json")
    for command in app.registered_commands:
        example = (command.epilog or "").removeprefix("Example: reap ").split()
        name = example[0]
        name = {"card": "model_card"}.get(name, name)
        if name not in reap.__all__:  # devices, demo, rpc-server: no function of the library has their name
            continue
        record(monkeypatch, name, error=UsageError("reached the library"))
        assert main([*example, "--force"] if name in ("profile", "merge") else example) == 2
        assert "reached the library" in capsys.readouterr().err


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)
    assert "profile" in "".join(capsys.readouterr())


# ---- options


def test_keep() -> None:
    assert [parse_keep(text) for text in ("0.5", "64", "1.0", "1", ".25")] == [0.5, 64, 1.0, 1, 0.25]
    assert [parse_keep(text) for text in ("50%", " 12.5 %", "100%")] == [0.5, 0.125, 1.0]
    assert [type(parse_keep(text)) for text in ("1.0", "1")] == [float, int]
    for text in ("half", "%", "50%%", "-5%", "", "1e-1"):
        with pytest.raises(UsageError, match="--keep should be"):
            parse_keep(text)


def test_lists() -> None:
    assert split_list(["a,b", "c"]) == ["a", "b", "c"]


def test_tensors_to_place_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = record(monkeypatch, "evaluate", None)
    monkeypatch.setattr("reap.cli.evaluate.print_evaluation", lambda result: None)
    assert main(["evaluate", "m.gguf", "t.txt", "-ot", r"\.ffn_.*=CPU,x=CUDA0"]) == 0
    assert called.options["override_tensors"] == ((r"\.ffn_.*", "CPU"), ("x", "CUDA0"))
    for text in ("CPU", "=CPU", "x="):
        assert main(["evaluate", "m.gguf", "t.txt", "-ot", text]) == 2
        assert "--override-tensor should be PATTERN=BUFFER" in capsys.readouterr().err


def test_profile_passes_the_library_s_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signature = inspect.signature(reap.profile)
    called = record(monkeypatch, "profile", make_profile())
    assert main(["profile", "m.gguf", "c.jsonl", "-o", str(tmp_path / "p.json")]) == 0
    assert called.arguments == (Path("m.gguf"), "c.jsonl")
    assert called.options.pop("checkpoint") == tmp_path / "p.json.resume"
    assert called.options.pop("progress")
    for name, value in called.options.items():
        default = signature.parameters[name].default
        assert (tuple(value) if default == () else value) == default, name
    assert Profile.load(tmp_path / "p.json").n_experts == 8


def test_evaluate_passes_the_library_s_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(reap.evaluate)
    called = record(monkeypatch, "evaluate", error=UsageError("stop"))
    assert main(["evaluate", "m.gguf", "t.txt"]) == 2
    assert called.arguments == (Path("m.gguf"), Path("t.txt"))
    assert called.options.pop("progress")
    for name, value in called.options.items():
        default = signature.parameters[name].default
        assert (tuple(value) if default == () else value) == default, name


LONG = [
    "--ctx-size",
    "64",
    "--batch-size",
    "32",
    "--ubatch-size",
    "16",
    "--threads",
    "3",
    "--gpu-layers",
    "10",
    "--override-tensor",
    "exps=CPU",
    "--type-k",
    "f32",
    "--type-v",
    "q8_0",
    "--flash-attn",
    "off",
]
SHORT = [
    "-c",
    "64",
    "-b",
    "32",
    "-ub",
    "16",
    "-t",
    "3",
    "-ngl",
    "10",
    "-ot",
    "exps=CPU",
    "-ctk",
    "f32",
    "-ctv",
    "q8_0",
    "-fa",
    "off",
]


@pytest.mark.parametrize("options", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_engine_options(command: str, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = record(monkeypatch, command, error=UsageError("stop"))
    output = ["-o", str(tmp_path / "p.json")] if command == "profile" else []
    more = ["--device", "CUDA0,CUDA1", "--rpc", "a:1", "--rpc", "b:2"]
    assert main([command, *options, "m.gguf", "text", *more, *output]) == 2
    expected = {
        "ctx_size": 64,
        "batch_size": 32,
        "ubatch_size": 16,
        "threads": 3,
        "gpu_layers": 10,
        "override_tensors": (("exps", "CPU"),),
        "type_k": "f32",
        "type_v": "q8_0",
        "flash_attn": "off",
        "devices": ("CUDA0", "CUDA1"),
        "rpc": ("a:1", "b:2"),
    }
    assert {name: called.options[name] for name in expected} == expected


@pytest.mark.parametrize("options", [["-ngl", "-1"], ["-ngl=-1"], ["--gpu-layers=-1"]])
def test_a_negative_number_of_layers(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = record(monkeypatch, "evaluate", error=UsageError("stop"))
    assert main(["evaluate", "m", "t", *options]) == 2
    assert called.options["gpu_layers"] == -1


def test_calibration_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = record(monkeypatch, "profile", make_profile())
    options = [
        "--chat-template",
        "auto",
        "--mask",
        "response",
        "--no-parse-special",
        "--max-tokens",
        "9",
        "--checkpoint",
        "c.npz",
        "--resume",
    ]
    assert main(["profile", "m.gguf", "a.jsonl", "b.txt", "-o", str(tmp_path / "p.json"), *options]) == 0
    assert called.arguments[1] == ["a.jsonl", "b.txt"]
    expected = {"chat_template": "auto", "mask": "response", "parse_special": False, "max_tokens": 9, "resume": True}
    assert {name: called.options[name] for name in expected} == expected
    assert called.options["checkpoint"] == Path("c.npz")
    assert main(["profile", "m.gguf", "a.jsonl", "-o", str(tmp_path / "q.json"), "--no-prediction-layers"]) == 0
    assert called.options["checkpoint"] == tmp_path / "q.json.resume"
    assert called.options["prediction_layers"] is False


def test_a_profile_that_cannot_be_written_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    kept = tmp_path / "kept"

    def measure(*_: Any, checkpoint: Path, **__: Any) -> Profile:
        checkpoint.write_text("{}")
        folder.rmdir()
        return make_profile()

    monkeypatch.setattr(reap, "profile", measure)
    arguments = ["profile", "m.gguf", "c.jsonl", "-o", str(folder / "p.json"), "--checkpoint", str(kept)]
    assert main(arguments) == 1
    assert f"; {kept} keeps what was measured, and --resume goes on from it" in capsys.readouterr().err
    assert kept.exists()


# ---- the commands that need no engine


def test_merge_compare_and_plan(profile_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_profile(2).save(tmp_path / "q.json")
    merged, made = tmp_path / "m.json", tmp_path / "plan.json"
    assert main(["merge", str(profile_path), str(other), "-o", str(merged)]) == 0
    assert Profile.load(merged).total_tokens.tolist() == [400, 400]
    assert main(["compare", str(profile_path), str(other), "--keep", "4", "--json"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text[text.index("{") :])
    assert document == reap.compare(profile_path, other, keep=4).to_dict()
    command = [
        "plan",
        str(merged),
        "--keep",
        "0.5",
        "--protect",
        "1:7",
        "--protect",
        "3:0,3:1",
        "--metric",
        "random",
        "--seed",
        "3",
    ]
    assert main([*command, "-o", str(made)]) == 0
    expected = reap.plan(merged, keep=0.5, protect="1:7,3:0,3:1", metric="random", seed=3)
    assert reap.PrunePlan.load(made) == expected
    assert "4 of 8 experts in each of 2 layers, by random" in capsys.readouterr().out
    assert main(["plan", str(merged), "--keep", "4"]) == 0  # only says what it would be


def test_inspect_and_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_moe(tmp_path / "m.gguf", n_layers=2, n_experts=8)
    info = reap.inspect(model)
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == info.fingerprint
    profile = make_profile(layers=(0, 1), model={"fingerprint": info.fingerprint}).save(tmp_path / "p.json")
    output = tmp_path / "small.gguf"
    command = ["prune", str(model), "--profile", str(profile), "--keep", "4", "-o", str(output), "--json"]
    assert main([*command, "--dry-run"]) == 0
    promised = json.loads(capsys.readouterr().out)
    assert not output.exists()
    assert main(command) == 0
    assert output.stat().st_size == promised["n_bytes_after"]
    assert main(command) == 2  # it is there now
    assert main([*command, "--force"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert "reap.metric" in capsys.readouterr().out
    assert main(["prune", str(model), "--plan", "x", "--keep", "3", "-o", str(tmp_path / "new.gguf")]) == 2
    assert "give either --plan, or --profile and --keep" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "plan", "profile"])
def test_an_output_that_cannot_be_is_refused_first(
    command: str, profile_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = record(monkeypatch, command, error=AssertionError("too late"))
    inputs = [str(profile_path), str(profile_path)][: 1 if command == "plan" else 2]
    inputs += ["--keep", "4"] if command == "plan" else []
    assert main([command, *inputs, "-o", "/absent/folder/x.json"]) == 2
    assert "there is no directory /absent/folder" in capsys.readouterr().err
    assert main([command, *inputs, "-o", str(profile_path), "--force"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert called.arguments == ()


# ---- errors and exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "/absent.json", "--keep", "4"], 2, "error: /absent.json: cannot read the profile"),
        (["plan", "{profile}", "--keep", "half"], 2, "error: --keep should be"),
        (["plan", "{profile}", "--keep", "1"], 2, "error: keep 1 is fewer than the 2 experts"),
        (["plan", "{profile}", "--keep", "4", "--metric", "x"], 2, "error: unknown metric 'x'"),
        (["plan", "{profile}"], 2, "Missing option"),
        (["plan", "{profile}", "--keep", "4", "--nonsense"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
        (["evaluate", "m", "t", "-c", "many"], 2, "--ctx-size"),
        (["plan", "{broken}", "--keep", "4"], 1, "broken.json: is not JSON"),
    ],
)
def test_exit_codes(
    arguments: list[str],
    code: int,
    message: str,
    profile_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.json").write_text("{")
    names = {"profile": profile_path, "broken": tmp_path / "broken.json"}
    assert main([argument.format(**names) if "{" in argument else argument for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (Interrupted("stopped; 300 samples are in c.npz"), 130, "error: stopped; 300 samples are in c.npz"),
        (MemoryError(), 1, "error: there is not enough memory"),
        (PermissionError(13, "Permission denied", "x.gguf"), 1, "error: [Errno 13] Permission denied: 'x.gguf'"),
        (
            RuntimeError("two\nlines"),
            1,
            "error: RuntimeError: two lines (this should not happen; REAP_TRACEBACK=1 shows where it did)",
        ),
        (ValueError(), 1, "error: ValueError"),
    ],
)
def test_nothing_ends_in_a_traceback(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, "evaluate", error=error)
    assert main(["evaluate", "m", "t"]) == code
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
    monkeypatch.setenv("REAP_TRACEBACK", "1")
    assert main(["evaluate", "m", "t"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ref.json"
    path.write_text(json.dumps(reference_document()))
    assert main(["plan", str(path), "--keep", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["keep"] == 2
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(profile_path: Path) -> None:
    script = f"{sys.executable} -m reap plan {profile_path} --keep 4 --json | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


# ---- bars and colours


def test_no_bar_and_no_colour_where_nobody_looks(
    profile_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "LINE_SECONDS", 0.01)
    with show.progress_bar("profiling") as progress:
        assert progress is not None
        progress(Progress(500, 4000, rate=7.0))
        time.sleep(0.3)
    assert "profiling: 500 / 4,000 tokens, 7 tokens/s, 0:08:20 left\n" in capsys.readouterr().err
    main(["plan", str(profile_path), "--keep", "4"])
    assert "\x1b" not in "".join(capsys.readouterr())


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    real = show.Console
    monkeypatch.setattr(show, "Console", lambda **_: real(file=screen, force_terminal=True, width=100))
    with show.progress_bar("profiling") as progress:
        assert progress is not None
        progress(Progress(500, None))
        progress(Progress(1500, 4000))
    assert "profiling" in screen.getvalue()
    assert "1,500 / 4,000" in screen.getvalue()


def test_the_time_left_is_steady_while_the_total_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(show.time, "monotonic", lambda: float(next(now)))
    pace = show._Pace()
    assert (pace.rate, pace.left_text()) == (None, "-:--:--")
    assert pace.line("profiling") == "profiling: preparing, for 1 s so far"
    pace.move(Progress(100, 1000, rate=10.0))  # from the first batch on
    assert pace.seconds_left == 90 - 1
    for done in range(200, 1000, 100):  # a slow run whose estimate never stands still
        pace.move(Progress(done, 1000 + done % 7, rate=10.0))
        assert pace.seconds_left is not None
        assert abs(pace.seconds_left - (1000 - done) / 10) <= 2
    pace = show._Pace()
    for done in (0, 10, 20):  # work that does not say how fast it is
        pace.move(Progress(done, 100, "windows"))
    assert pace.rate == 10
    pace.move(Progress(1, 100, "windows"))
    assert pace.rate is None


def test_nothing_is_heard_for_minutes_but_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "LINE_SECONDS", 0.01)
    with show.progress_bar("profiling"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert set(lines) == {"profiling: preparing, for 0 s so far"}
    assert threading.active_count() == 1
    show.be_quiet(True)
    try:
        with show.progress_bar("profiling") as progress:
            assert progress is None
    finally:
        show.be_quiet(False)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {3: "é"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": {"3": "é"}}


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (12345678, "11.8 MiB"), (5 << 30, "5.00 GiB")],
)
def test_bytes_text(n_bytes: int, text: str) -> None:
    assert show.bytes_text(n_bytes) == text


# ---- the whole road, with the engine


def test_profile_plan_prune_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_moe(tmp_path / "m.gguf", n_layers=2, n_experts=8, n_used=2)
    lines = [{"tokens": [(7 * i + n) % 64 for n in range(50)], "domain": "ab"[i % 2]} for i in range(6)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {key: str(tmp_path / key) for key in ("m.gguf", "c.jsonl", "p.json", "plan.json", "small.gguf")}
    assert (
        main(["profile", names["m.gguf"], names["c.jsonl"], "-o", names["p.json"], "-c", "32", "-ub", "32", "-t", "1"])
        == 0
    )
    assert "300 of 6 samples" in capsys.readouterr().out
    assert main(["plan", names["p.json"], "--keep", "0.5", "--blend", "maxmin", "-o", names["plan.json"]]) == 0
    assert main(["prune", names["m.gguf"], "--plan", names["plan.json"], "-o", names["small.gguf"]]) == 0
    assert reap.inspect(names["small.gguf"]).n_experts == 4
    odd = tmp_path / os.fsdecode(b"caf\xff.gguf")  # a name that is not UTF-8
    odd.symlink_to(names["small.gguf"])
    figures = tmp_path / "e.json"
    assert main(["evaluate", str(odd), names["c.jsonl"], "-c", "16", "-t", "1", "-o", str(figures)]) == 0
    assert json.loads(figures.read_text())["model"] == str(odd)
    again = ["profile", names["small.gguf"], names["c.jsonl"], "-o", names["p.json"], "-c", "32", "-t", "1"]
    assert main(again) == 2  # the profile of the whole model is there
    assert main([*again, "--force"]) == 0
    assert Profile.load(names["p.json"]).n_experts == 4


def test_demo_unpacks_its_files(tmp_path: Path) -> None:
    work = demonstration.Files(tmp_path / "new" / "folder")
    demonstration.unpack(work)
    assert reap.inspect(work.model).is_moe
    assert work.calibration.read_text().startswith("{")
    assert all(path.stat().st_size > 10_000 for path in work.texts.values())
    demonstration.unpack(work)  # what is there is left
    work.calibration.write_text("mine")
    with pytest.raises(UsageError, match=r"sample_calibration\.jsonl: is there and is not the demo's"):
        demonstration.unpack(work)
