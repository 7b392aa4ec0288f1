"""Run inside the child process of `reap.hf.disk.convert`: prepares llama.cpp's converter, then hands over to it.
Imports nothing of reap's.

python _convert_child.py --tree DIR [--pre NAME] [--no-prediction] [--trust-remote-code] -- ARGUMENTS OF THE CONVERTER

Standard input is one line, a JSON object of keys to add to the file: name -> text, number or list of numbers. It stays
open: where it closes, the process that wanted the file is gone, and so are this one and what it has written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


def refuse_remote_code() -> None:
    """Make every `from_pretrained` the converter calls behave as if it had not asked for `trust_remote_code`.

    With that off, transformers uses its own class for a model type it knows and refuses one it does not.
    """
    transformers = importlib.import_module("transformers")
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        auto.from_pretrained = _without_remote_code(auto.from_pretrained)


def _without_remote_code(original: Any) -> Any:
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "trust_remote_code": False})

    return from_pretrained


def keep_published_names() -> None:
    """Let config.json's own entries win over those that transformers makes of them (`ModelBase.load_hparams`).

    transformers renames entries of some models as it reads them (Step-3.5, Granite hybrid), and the converter knows the
    published names. What transformers adds, such as defaults, stays.
    """
    base: Any = importlib.import_module("conversion.base")
    original = base.AutoConfig

    class AutoConfig:
        @staticmethod
        def from_pretrained(directory: Any, **options: Any) -> Any:
            return _Merged(original.from_pretrained(directory, **options).to_dict(), Path(directory) / "config.json")

    base.AutoConfig = AutoConfig


class _Merged:
    def __init__(self, read: dict[str, Any], path: Path) -> None:
        self.read, self.path = read, path

    def to_dict(self) -> dict[str, Any]:
        return _overlay(self.read, json.loads(self.path.read_text(encoding="utf-8")))


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the entries of `over`, nulls left out, inside nested objects too."""
    result = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _overlay(result[key], value)
        elif value is not None:
            result[key] = value
    return result


def end_with_parent(outfile: str) -> None:
    """End this process where standard input closes, and take the half-written file along."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        with suppress(OSError):
            os.unlink(outfile)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outfile(arguments: list[str]) -> str:
    return os.path.abspath(arguments[arguments.index("--outfile") + 1])


def add_keys(keys: dict[str, Any]) -> None:
    """Write `keys` after those of the converter, in the types that `reap.prune` gives them."""
    gguf = importlib.import_module("gguf")
    original = gguf.GGUFWriter.write_header_to_file

    def write_header_to_file(writer: Any, *arguments: Any, **options: Any) -> Any:
        types = gguf.GGUFValueType
        for key, value in keys.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, types.ARRAY, sub_type=types.INT32)
            else:
                writer.add_key_value(key, value, types.STRING if isinstance(value, str) else types.UINT32)
        return original(writer, *arguments, **options)

    gguf.GGUFWriter.write_header_to_file = write_header_to_file


def leave_prediction_out() -> None:
    """As the converter's --no-mtp, which it refuses for models that never have prediction layers."""
    importlib.import_module("conversion.base").ModelBase.no_mtp = True


def set_pre_tokenizer(name: str) -> None:
    """Answer the question that the converter answers from a table of hashes (`TextModel.get_vocab_base_pre`)."""
    base: Any = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda _model, _tokenizer: name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--pre")
    parser.add_argument("--no-prediction", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()

    # in place of this file's own directory, whose modules must not be found by their bare names
    sys.path[0] = str(options.tree)
    sys.path.insert(1, str(options.tree / "gguf-py"))
    if not options.trust_remote_code:
        refuse_remote_code()
    keep_published_names()
    keys = json.loads(sys.stdin.readline())
    end_with_parent(_outfile(options.arguments))
    if keys:
        add_keys(keys)
    if options.no_prediction:
        leave_prediction_out()
    if options.pre is not None:
        set_pre_tokenizer(options.pre)
    script = str(options.tree / "convert_hf_to_gguf.py")
    sys.argv = [script, *options.arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
