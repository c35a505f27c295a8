"""How `octavo tokenize` compares with the tokenizer's library alone, per core, on the same text.

    python benchmarks/tokenize_speed.py FOLDER [--gigabytes 1] [--tokenizer PATH] [--workers 2]

FOLDER lies on the disk in question and is left empty. The text is what Python packages are made of here
(.py, .md, .rst, .txt files), one document a line of JSON, repeated until it is as large as asked for.

1  One core. A unit of `octavo tokenize` (read, parse, encode, checksum, write, record) and the library's own
   batch calls on the same documents, already in memory, take turns in this process, one thread working at a
   time; so whatever else the machine does hits all alike. Wall-clock time and processor time of each are
   summed. Of the tokenizers library both calls are timed: encode_batch, and encode_batch_fast, which leaves
   out what is no id and is what `octavo tokenize` calls.
2  The command with --workers, and the resident memory of its largest worker over its time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import psutil

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")

from trainer.data.tokenize_plan import TextSource, Unit, plan_units
from trainer.data.tokenize_worker import WORK, Job, start_process, tokenize_unit
from trainer.data.tokenizer import HuggingFaceTokenizer, Tokenizer, build_tokenizer
from trainer.data.tokenizer_models import SentencePieceTokenizer

SUFFIXES = (".py", ".md", ".rst", ".txt")
FILE_BYTES = 16_000_000
LIBRARY_BATCH = 1024


def documents() -> Iterator[str]:
    """Text of installed packages, over and over."""
    files = [p for p in sorted(Path(sysconfig.get_path("purelib")).rglob("*")) if p.suffix in SUFFIXES]
    for file in cycle(files):
        text = file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else ""
        if text:
            yield text


def write_text(folder: Path, size: int) -> int:
    """JSON lines of about `size` bytes of text; returns the bytes of text."""
    folder.mkdir()
    written, texts = 0, documents()
    for number in range(max(1, round(size / FILE_BYTES))):
        held = 0
        with (folder / f"part-{number:04d}.jsonl").open("w", encoding="utf-8") as file:
            while held < min(size, FILE_BYTES):
                text = next(texts)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                held += len(text.encode())
        written += held
    return written


def library_calls(tokenizer: Tokenizer) -> dict[str, Callable[[list[str]], object]]:
    """The library's own batch calls by name, in one thread."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        library = tokenizer._tokenizer
        return {
            "encode_batch": lambda texts: library.encode_batch(texts, add_special_tokens=False),
            "encode_batch_fast": lambda texts: library.encode_batch_fast(texts, add_special_tokens=False),
        }
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"encode": lambda texts: tokenizer._processor.encode(texts, num_threads=1)}
    encoding = tokenizer._encoding  # type: ignore[attr-defined]
    return {"encode_ordinary_batch": lambda texts: encoding.encode_ordinary_batch(texts, num_threads=1)}


def timed(work: Callable[[], object], seconds: list[float]) -> None:
    """Add the wall-clock and the processor time of `work`."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    seconds[0] += time.perf_counter() - wall
    seconds[1] += time.process_time() - processor


def one_core(text: Path, out: Path, path: str) -> None:
    """Part 1 of the module's docstring."""
    source = TextSource.parse(str(text), "text")
    tokenizer = build_tokenizer(path)
    calls = library_calls(tokenizer)
    (out / WORK).mkdir(parents=True)
    start_process(
        Job(source, str(tokenizer.file), str(out), "uint32", False, 0),
        multiprocessing.Array("q", 2),
        multiprocessing.Event(),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seconds = {name: [0.0, 0.0] for name in ("octavo tokenize", *calls)}
    size = 0
    # One file a unit: turns are short.
    units = [
        Unit(i, file.stat().st_size, (str(file),)) for i, file in enumerate(sorted(text.glob("*.jsonl")))
    ]
    for unit in units:
        lines = Path(unit.files[0]).read_text(encoding="utf-8").split("\n")
        texts = [json.loads(line)["text"] for line in lines if line]
        size += sum(len(text.encode()) for text in texts)
        del lines

        def library(call: Callable[[list[str]], object], texts: list[str] = texts) -> None:
            for start in range(0, len(texts), LIBRARY_BATCH):
                call(texts[start : start + LIBRARY_BATCH])

        turns: dict[str, Callable[[], object]] = {
            "octavo tokenize": partial(tokenize_unit, unit),
            **{name: partial(library, call) for name, call in calls.items()},
        }
        names = list(turns)
        first = unit.number % len(names)
        for name in names[first:] + names[:first]:
            timed(turns[name], seconds[name])
    print(f"one core, {size / 1e6:,.0f} MB of text in {len(units)} turns, {type(tokenizer).__name__}")
    ours = seconds["octavo tokenize"]
    for name, both in seconds.items():
        wall, processor = (size / 1e6 / value for value in both)
        print(f"  {name:<22} {wall:6.2f} MB/s by the clock  {processor:6.2f} MB/s of processor time")
    for name in calls:
        wall, processor = (theirs / mine for mine, theirs in zip(ours, seconds[name], strict=True))
        print(f"  ours / {name:<22} {wall:.3f} by the clock, {processor:.3f} of processor time")


def whole_command(text: Path, out: Path, path: str, workers: int, size: int) -> None:
    """Part 2."""
    units = len(plan_units(TextSource.parse(str(text), "text"), False))
    words = ["tokenize", str(text), "--out", str(out), "--workers", str(workers), "--tokenizer", path]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "trainer.cli", *words])
    seen: list[tuple[float, int]] = []
    while process.poll() is None:
        largest = 0
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                largest = max(largest, child.memory_info().rss)
            except psutil.Error:
                continue
        seen.append((time.perf_counter() - started, largest))
        time.sleep(0.2)
    seconds = time.perf_counter() - started
    assert process.returncode == 0
    print(
        f"the command, {workers} workers, {units} shards: {seconds:.1f} s, {size / 1e6 / seconds:.2f} MB/s, "
        "its start included"
    )
    quarters = [
        max((rss for at, rss in seen if n <= 4 * at / seconds < n + 1), default=0) / 1e6 for n in range(4)
    ]
    print("  largest worker by quarter of its time: " + ", ".join(f"{rss:,.0f} MB" for rss in quarters))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenizer", default="./tests/assets/tokenizer")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    scratch = options.folder / f"tokenize-speed-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        size = write_text(scratch / "text", int(options.gigabytes * 1e9))
        one_core(scratch / "text", scratch / "one", options.tokenizer)
        whole_command(scratch / "text", scratch / "all", options.tokenizer, options.workers, size)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
