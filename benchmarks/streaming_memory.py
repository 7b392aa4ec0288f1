"""How much memory it takes to read a large calibration: a JSON array of 5 GB through a pipe, a Parquet file of 2 GB in
one row group, JSON Lines of 2 GB in Zstandard.

    python benchmarks/streaming_memory.py [--scale 0.1]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GB = 10**9
LIMIT_MB = 300
READ = """
import sys
from pathlib import Path
from reap.text.samples import SampleReader

n = sum(len(sample.text) for sample in SampleReader(sys.argv[1]))
print(n, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def texts(n_bytes: float, seed: int = 0) -> Iterator[str]:
    """Texts of 1 to 100 KB, of words that repeat as words do."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    pages = [" ".join(draw.choices(words, k=17_000)) for _ in range(50)]
    while n_bytes > 0:
        start, length = draw.randrange(1000), draw.randint(1_000, 99_000)
        text = draw.choice(pages)[start : start + length]
        yield text
        n_bytes -= len(text)


def feed_array(path: Path, n_bytes: float) -> None:
    """One JSON array, written as it is read."""
    with open(path, "w") as file:
        for index, text in enumerate(texts(n_bytes)):
            file.write("[\n" if index == 0 else ",\n")
            json.dump({"text": text, "meta": {"id": index}}, file)
        file.write("]\n")


def write_parquet(path: Path, n_bytes: float) -> None:
    """One row group, not compressed, with a column that is not read."""
    import pyarrow
    import pyarrow.parquet

    rows = list(texts(n_bytes))
    table = pyarrow.table({"text": rows, "id": [str(index) for index in range(len(rows))]})
    options = {"row_group_size": len(rows), "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(table, path, **options)


def write_zstd(path: Path, n_bytes: float) -> None:
    """JSON Lines, compressed."""
    import zstandard

    with open(path, "wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as out:
        for text in texts(n_bytes):
            out.write(json.dumps({"text": text}).encode() + b"\n")


def measure(path: Path, feed: Callable[[], None] | None = None) -> tuple[int, float, float]:
    """Characters read, seconds, and the reader's peak in MB."""
    feeder = threading.Thread(target=feed, daemon=True) if feed else None
    if feeder:
        os.mkfifo(path)
        feeder.start()
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    n_characters, peak = map(int, done.stdout.split())
    return n_characters, seconds, peak / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes")
    options = parser.parse_args()
    print(f"{'calibration':<42} {'characters':>15} {'seconds':>8} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        pipe, parquet, packed = (Path(folder) / name for name in ("array.json", "d.parquet", "d.jsonl.zst"))
        sizes = [round(size * options.scale * GB) for size in (5, 2, 2)]
        runs = [("JSON array, through a pipe", pipe, lambda: feed_array(pipe, sizes[0]))]
        write_parquet(parquet, sizes[1])
        runs.append(("Parquet, one row group", parquet, None))
        write_zstd(packed, sizes[2])
        runs.append(("JSON Lines, .zst", packed, None))
        for name, path, feed in runs:
            n_characters, seconds, peak = measure(path, feed)
            print(f"{name:<42} {n_characters:>15,} {seconds:>8.0f} {peak:>8.0f}", flush=True)
            assert peak < LIMIT_MB, f"{name}: {peak:.0f} MB"


if __name__ == "__main__":
    main()
