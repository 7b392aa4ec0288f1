"""Train a second small Mixture-of-Experts model on the interpreter's standard library, where one is needed beside the
embedded one: other experts, other text, a few minutes on two cores.

    pip install torch transformers tokenizers
    python benchmarks/small_model.py DIR     # DIR/model.gguf, DIR/calibration.jsonl, DIR/heldout.jsonl

Code is one domain, docstrings are the other. Files are sorted by the hash of their name: the first are held out, the
next are calibration, the model is trained on the rest.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from train_embedded_model import Recipe, Split, Trainer, encode, excerpt, train_tokenizer

import reap

RECIPE = Recipe(
    vocab_size=512, hidden=64, layers=3, heads=2, kv_heads=2, head_dim=32, experts=16, experts_used=2, expert_width=64,
    context=128, windows_per_step=8, steps=1500,
)  # fmt: skip
HELDOUT_CHARS = 60_000  # a domain
CALIBRATION_CHARS = 60_000
MOST_FILES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    splits = {"code": Split(), "prose": Split()}
    for domain, text in library_texts():
        split = splits[domain]
        for part, room in ((split.heldout, HELDOUT_CHARS), (split.calibration, CALIBRATION_CHARS)):
            if sum(map(len, part)) < room:
                part.append(excerpt(text))
                break
        else:
            split.train.append(text)
    for name in ("heldout", "calibration"):
        lines = [{"domain": d, "text": text} for d, split in splits.items() for text in getattr(split, name)]
        (args.work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = train_tokenizer(splits, RECIPE.vocab_size)
    tokenizer.save_pretrained(args.work)
    recipe = Recipe(**{**vars(RECIPE), "steps": args.steps})
    trainer = Trainer(recipe, [encode(tokenizer, split.train) for split in splits.values()])
    started, losses = time.monotonic(), []
    for step in range(recipe.steps):
        losses.append(trainer.step(step)[0])
        if (step + 1) % 100 == 0:
            passed = time.monotonic() - started
            print(f"step {step + 1}: loss {sum(losses) / len(losses):.3f}, {passed:.0f} s", flush=True)
            losses = []
    trainer.save(args.work, recipe.steps)
    reap.convert(args.work, args.work / "model.gguf", outtype="q8_0", pre="qwen2", force=True)


def library_texts() -> Iterator[tuple[str, str]]:
    """(domain, text) of the standard library's files, in an order that their names' hashes give."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.rglob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib"}
    for path in [path for path in paths if not skipped & set(path.parts)][:MOST_FILES]:
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < 2_000:
            continue
        yield "code", text[:60_000]
        documented = ast.FunctionDef | ast.ClassDef | ast.Module
        docs = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        prose = "\n\n".join(doc for doc in docs if doc and len(doc) > 80)
        if len(prose) >= 1_000:
            yield "prose", prose + "\n"


if __name__ == "__main__":
    main()
