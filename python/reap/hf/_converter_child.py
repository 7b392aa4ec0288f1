"""Run inside the child process of `reap.hf.converter`: prepares llama.cpp's converter, then hands over to it. Imports nothing of reap's.

python _converter_child.py --tree DIR [--pre NAME] [--trust-remote-code] -- ARGUMENTS OF THE CONVERTER
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
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


def set_pre_tokenizer(name: str) -> None:
    """Answer the question that the converter answers from a table of hashes (`TextModel.get_vocab_base_pre`)."""
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda _model, _tokenizer: name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--pre")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()

    # in place of this file's own directory, whose modules must not be found by their bare names
    sys.path[0] = str(options.tree)
    sys.path.insert(1, str(options.tree / "gguf-py"))
    if not options.trust_remote_code:
        refuse_remote_code()
    if options.pre is not None:
        set_pre_tokenizer(options.pre)
    script = str(options.tree / "convert_hf_to_gguf.py")
    sys.argv = [script, *options.arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
