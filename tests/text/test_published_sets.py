"""Files in the shapes of data sets as they are published, against a converter that knows each of them by name: slow,
obvious, and nothing of reap's in it."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from reap.text.windows import Calibration

Row = dict[str, Any]

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}{{ '\n' }}{% endfor %}"
)


class Bytes:
    """A tokenizer of one token a byte, and a BOS of 256."""

    n_vocab = 1000
    has_tokenizer = True
    add_bos = True
    bos = 256
    eos = None
    chat_template = TEMPLATE

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [256] * add_special + list(text.encode())

    def token_text(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b"<s>"


# ---- how each set is to be read


def chat(turns: list[tuple[str, str]], tools: str = "") -> str:
    return tools + "".join(f"[{role}]{content}\n" for role, content in turns)


WHO = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}


def sharegpt(row: Row) -> str:
    return chat([(WHO[turn["from"]], turn["value"]) for turn in row["conversations"]])


def openai(name: str) -> Callable[[Row], str]:
    return lambda row: chat([(turn["role"], turn["content"]) for turn in row[name]])


def joined(prompt: str, response: str) -> Callable[[Row], str]:
    return lambda row: row[prompt] + "\n" + row[response]


def alpaca(row: Row) -> str:
    prompt = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return prompt + "\n" + row["output"]


def dolly(row: Row) -> str:
    prompt = row["instruction"] + ("\n\n" + row["context"] if row["context"] else "")
    return prompt + "\n" + row["response"]


def xlam(row: Row) -> str:
    tools = "".join(json.dumps({"type": "function", "function": tool}) for tool in json.loads(row["tools"]))
    calls = "".join(
        f"<call>{call['name']}{json.dumps(call['arguments'])}</call>" for call in json.loads(row["answers"])
    )
    return f"<tools>{tools}</tools>[user]{row['query']}\n[assistant]{calls}\n"


def hermes(row: Row) -> str:
    tools = "".join(json.dumps(tool) for tool in json.loads(row["tools"]))
    return f"<tools>{tools}</tools>" + sharegpt(row)


def swe_smith(row: Row) -> str:
    return chat([(turn["role"], turn["content"]) for turn in json.loads(row["messages"])])


def capybara(row: Row) -> str:
    return chat(
        [side for turn in row["conversation"] for side in (("user", turn["input"]), ("assistant", turn["output"]))]
    )


USER = {"role": "user", "content": "QQ é"}
ANSWER = {"role": "assistant", "content": "a 😀"}
WORSE = {"role": "assistant", "content": "worse"}
TOOLS = [{"name": "weather", "description": "d", "parameters": {"city": {"type": "str"}}}]
OPENAI_TOOLS = [{"type": "function", "function": tool} for tool in TOOLS]
CALLS = [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "weather", "arguments": {"city": "Rom"}}]
THREE = [{"from": "system", "value": "s"}, {"from": "human", "value": "QQ"}, {"from": "gpt", "value": "a\nb"}]


def numbered(row: Row, n: int = 3) -> list[Row]:
    """n rows that differ in what they say."""
    return [json.loads(json.dumps(row).replace("QQ", f"Q{index}")) for index in range(n)]


# name, suffix, one row, what is to be read of it
SETS: list[tuple[str, str, Row, Callable[[Row], str]]] = [
    ("evol-codealpaca-v1", ".jsonl", {"instruction": "QQ", "output": "a\nb"}, joined("instruction", "output")),
    ("alpaca", ".json", {"instruction": "QQ", "input": "more", "output": "a", "text": "all of it"}, alpaca),
    ("alpaca, no input", ".json", {"instruction": "QQ", "input": "", "output": "a"}, alpaca),
    ("dolly-15k", ".jsonl", {"instruction": "QQ", "context": "c", "response": "a", "category": "open"}, dolly),
    (
        "xlam-function-calling-60k",
        ".json",
        {"id": 1, "query": "QQ", "answers": json.dumps(CALLS), "tools": json.dumps(TOOLS)},
        xlam,
    ),
    (
        "SWE-smith-trajectories",
        ".parquet",
        {"messages": json.dumps([{"role": "system", "content": "s"}, USER, ANSWER]), "resolved": True, "patch": "diff"},
        swe_smith,
    ),
    ("ultrachat_200k", ".parquet", {"prompt": "QQ", "prompt_id": "x", "messages": [USER, ANSWER]}, openai("messages")),
    ("c4", ".json.gz", {"text": "QQ in prose\n", "timestamp": "2019", "url": "http://a"}, lambda row: row["text"]),
    (
        "the-stack",
        ".parquet",
        {"content": "def QQ():\n\tpass\n", "size": 3, "lang": "Python"},
        lambda row: row["content"],
    ),
    ("code search", ".parquet", {"code": "QQ", "repo": "r"}, lambda row: row["code"]),
    ("ShareGPT", ".json", {"id": "x", "conversations": THREE}, sharegpt),
    (
        "OpenHermes-2.5",
        ".json",
        {"conversations": THREE, "idx": None, "system_prompt": None, "title": None, "source": "airoboros"},
        sharegpt,
    ),
    ("lmsys-chat-1m", ".parquet", {"conversation": [USER, ANSWER], "model": "m", "turn": 1}, openai("conversation")),
    ("Capybara", ".jsonl", {"source": "x", "conversation": [{"input": "QQ", "output": "a"}] * 2}, capybara),
    ("gsm8k", ".parquet", {"question": "QQ", "answer": "a #### 3"}, joined("question", "answer")),
    (
        "MetaMathQA",
        ".json",
        {"type": "GSM", "query": "QQ", "original_question": "o", "response": "a"},
        joined("query", "response"),
    ),
    ("completions", ".csv", {"prompt": 'QQ, "quoted"\nand more', "completion": "a"}, joined("prompt", "completion")),
    ("io", ".tsv", {"input": "QQ", "output": "a\tb"}, joined("input", "output")),
    (
        "NuminaMath-CoT",
        ".parquet",
        {"source": "s", "problem": "QQ", "solution": "a", "messages": [USER, ANSWER]},
        openai("messages"),
    ),
    ("hh-rlhf", ".jsonl.gz", {"chosen": "\n\nHuman: QQ", "rejected": "no"}, lambda row: row["chosen"]),
    (
        "ultrafeedback_binarized",
        ".parquet",
        {"prompt": "QQ", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "score_chosen": 8.0},
        openai("chosen"),
    ),
    (
        "orca_dpo_pairs",
        ".jsonl",
        {"system": "", "question": "QQ", "chosen": "a", "rejected": "b"},
        joined("question", "chosen"),
    ),
    ("hermes-function-calling-v1", ".json", {"conversations": THREE, "tools": json.dumps(OPENAI_TOOLS)}, hermes),
]


def write(path: Path, rows: list[Row]) -> Path:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if plain.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="\t" if plain.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(rows)
        return path
    is_array = plain.suffix == ".json" and path.suffix != ".gz"
    text = json.dumps(rows, indent=1) if is_array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(source: Any, **options: Any) -> list[list[int]]:
    windows = Calibration(source, ctx_size=10_000, **options).windows(Bytes())
    return [window.tokens.tolist() for window in windows]


@pytest.mark.parametrize(("name", "suffix", "row", "convert"), SETS, ids=[name for name, *_ in SETS])
def test_a_published_set(tmp_path: Path, name: str, suffix: str, row: Row, convert: Callable[[Row], str]) -> None:
    rows = numbered(row)
    expected = [[256, *convert(row).encode()] for row in rows]
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert read(write(tmp_path / f"data{suffix}", rows)) == expected
    assert read(rows) == expected  # as `datasets` gives them


def test_a_line_of_each_in_one_file(tmp_path: Path) -> None:
    rows = [row for _, _, row, _ in SETS]
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = Calibration(path, ctx_size=10_000)
    found = [bytes(window.tokens[1:].tolist()).decode() for window in calibration.windows(Bytes())]
    assert found == [convert(row) for _, _, row, convert in SETS]
    shapes = calibration.summary()["shapes"]
    assert sum(shapes.values()) == len(SETS)
    assert shapes["instruction+output"] == 2
    assert shapes["instruction+input+output"] == 1
    assert shapes["conversations"] == 3
    assert [note.split(": ", 1)[1] for note in calibration.notes if note.startswith(str(path))] == [
        "has text as well; instruction+input+output is read",
        "has problem+solution as well; messages is read",
    ]


def test_wikitext(tmp_path: Path) -> None:
    """Rows without text, as between its headings, are counted and left out."""
    path = write(tmp_path / "wiki.parquet", [{"text": text} for text in ("", " = Title = \n", "", "Words\n")])
    calibration = Calibration(path, ctx_size=100)
    assert [bytes(window.tokens[1:].tolist()) for window in calibration.windows(Bytes())] == [
        b" = Title = \n",
        b"Words\n",
    ]
    assert calibration.summary()["skipped_reasons"] == {"no text": 2}


def test_tokens_as_a_trainer_keeps_them(tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 6, 7, -100, -100]}
    path = write(tmp_path / "tokens.parquet", [row, row])
    assert read(path) == [[5, 6, 7]] * 2
    (window, _) = Calibration(path, ctx_size=100, mask="response").windows(Bytes())
    assert window.tokens[window.counted].tolist() == [6, 7]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """datasets.save_to_disk: Arrow streams, and a state.json that names them in order."""
    rows = numbered({"text": "QQ and more"}, 5)
    folder = tmp_path / "saved"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:3], rows[3:]), strict=True):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    expected = [[256, *row["text"].encode()] for row in rows]
    assert read(folder) == expected
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["saved"]}))
    assert read(tmp_path) == expected


def test_a_folder_as_it_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00001.parquet", [{"text": "two"}])
    write(tmp_path / "data" / "train-00000.parquet", [{"text": "one"}])
    (tmp_path / "data" / "z.txt").write_text("three")
    for name in ("README.md", ".gitattributes", "LICENSE.txt", "picture.png", "dataset_infos.json"):
        (tmp_path / name).write_text("not of the data")
    assert read(tmp_path) == [[256, *text] for text in (b"one", b"two", b"three")]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
PLAIN = {
    "c.jsonl": b'{"text": "one \xc3\xa9"}\n\n{"prompt": "a", "response": "b"}\n' * 50,
    "c.json": json.dumps([{"text": "one"}, {"text": "two\n"}] * 50).encode(),
    "c.csv": b"text,domain\r\n" + b'"one, ""and""\r\nmore",d\r\ntwo,\r\n' * 50,
    "c.txt": "prose é\nand more\n".encode() * 500,
    "c.md": b"# Title\n",
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", PLAIN)
def test_each_compressed_form_has_the_same_tokens(tmp_path: Path, name: str, suffix: str) -> None:
    data, compress = PLAIN[name], COMPRESS[suffix]
    middle = len(data) // 3
    (tmp_path / name).write_bytes(data)
    (tmp_path / f"{name}{suffix}").write_bytes(compress(data[:middle]) + compress(data[middle:]))
    plain = list(Calibration(tmp_path / name, ctx_size=64).windows(Bytes()))
    packed = list(Calibration(tmp_path / f"{name}{suffix}", ctx_size=64).windows(Bytes()))
    assert plain[-1].consumed == packed[-1].consumed
    assert [window.line for window in plain] == [window.line for window in packed]
    # by its content, whatever it is called
    (tmp_path / "renamed").write_bytes(COMPRESS[suffix](data))
    assert list(Calibration(tmp_path / "renamed", ctx_size=64).windows(Bytes()))[-1].consumed == plain[-1].consumed


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", PLAIN)
def test_other_encodings_are_read_by_their_mark(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(PLAIN[name])
    text = PLAIN[name].decode()
    marked = ("\ufeff" + text).encode(encoding) if encoding == "utf-16-be" else text.encode(encoding)
    (tmp_path / f"marked-{name}").write_bytes(marked)
    (tmp_path / f"marked-{name}.gz").write_bytes(gzip.compress(marked))
    assert read(tmp_path / f"marked-{name}") == read(tmp_path / name) == read(tmp_path / f"marked-{name}.gz")
