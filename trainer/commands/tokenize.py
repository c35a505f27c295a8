"""``octavo tokenize``: text to token files, in parallel, once and for all.

The source is divided into units (`trainer.data.tokenize_plan`); worker processes turn each into a shard
(`trainer.data.tokenize_worker`); the index is written last. The bytes of the result follow from the source,
the tokenizer and the options alone: not from the number of workers, nor from how often it was interrupted.
A run that was cut off goes on where it was when it is started again; finished shards are not made anew.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_EXIT_INTERRUPTED = 130
_PLAN_FILE = "plan.json"


def tokenize(
    src: str,
    out: str = "outputs/tokens",
    workers: int = 0,
    tokenizer: str = "./tests/assets/tokenizer",
    text_field: str = "text",
    bad_data: str = "refuse",
    validation_one_in: int = 0,
    verify: bool = False,
) -> Path:
    """Tokenize text into a folder that training.dataset=token_files reads.

    Args:
        src: A file, folder or glob of .txt, JSON lines or Parquet files; or a name of the datasets table,
            with a path where it needs one (hugging_face:allenai/c4:en).
        out: Folder to write.
        workers: Processes; 0 for one a core. The result does not depend on it.
        tokenizer: Folder or file, as in model.hf_assets_path.
        text_field: Field or column that holds the text, where records have fields.
        bad_data: refuse or skip records and files that cannot be read; skipped ones are counted.
        validation_one_in: Hold one document in so many out, into OUT/validation; 0 holds none out.
        verify: Compare the token files at SRC with their checksums, and write nothing.

    Returns:
        The folder.

    Raises:
        ValueError: The source cannot be read, or the folder holds something else.
    """
    if verify:
        return _verify(src)
    _check_options(workers, bad_data, validation_one_in)
    # Worker processes are what runs in parallel; their libraries' threads would only get in the way.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    from trainer.data.token_manifest import INDEX_FILE
    from trainer.data.tokenize_plan import TextSource, plan_digest, plan_units
    from trainer.data.tokenize_worker import VALIDATION, Job
    from trainer.data.tokenizer import build_tokenizer

    source = TextSource.parse(src, text_field)
    loaded = build_tokenizer(tokenizer)
    units = plan_units(source, loaded.splits_at_lines)
    dtype = "uint16" if loaded.vocab_size <= 1 << 16 else "uint32"
    job = Job(source, str(loaded.file), out, dtype, bad_data == "skip", validation_one_in)
    settings = {
        "dataset": source.dataset,
        "text_field": text_field,
        "bad_data": bad_data,
        "validation_one_in": validation_one_in,
        "tokenizer": loaded.fingerprint,
    }
    plan = plan_digest(units, settings)
    folder = Path(out)
    try:
        if _is_done(folder / INDEX_FILE, plan):
            print(f"{folder}: complete already, nothing to do (octavo tokenize {folder} --verify checks it)")
            return folder
        with _working_in(folder, plan, bool(validation_one_in)):
            records = _run(job, units, workers or os.cpu_count() or 1)
            facts = {"plan": plan, "source": src, "dtype": dtype, "tokenizer": loaded}
            if validation_one_in:
                _write_index(folder / VALIDATION, VALIDATION, records, facts)
            totals = _write_index(folder, "", records, facts)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written\n  got: {error}") from error
    shutil.rmtree(folder / ".work", ignore_errors=True)
    _report(folder, totals, records)
    return folder


def _verify(src: str) -> Path:
    from trainer.data.token_files import verify_token_files

    manifest = verify_token_files(src)
    counts = f"{len(manifest.shards):,} shards, {manifest.tokens:,} tokens"
    print(f"{manifest.folder}: {counts}: every file is as written")
    return manifest.folder


def _check_options(workers: int, bad_data: str, validation_one_in: int) -> None:
    if workers < 0:
        raise ValueError(f"workers = {workers}\n  allowed: 0 (one a core) or more")
    if bad_data not in ("refuse", "skip"):
        raise ValueError(f"bad_data = {bad_data!r}\n  allowed: refuse, skip")
    if validation_one_in < 0 or validation_one_in == 1:
        raise ValueError(f"validation_one_in = {validation_one_in}\n  allowed: 0 (none) or 2 and more")


def _is_done(index: Path, plan: str) -> bool:
    """Whether the folder holds what would be written; an error where it holds something else."""
    if not index.is_file():
        return False
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("plan") != plan:
        raise ValueError(
            f"{index.parent}: holds the tokens of another source, tokenizer or set of options\n"
            "  choose another --out, or remove that folder"
        )
    from trainer.data.token_manifest import read_manifest

    read_manifest(str(index.parent))
    return True


@contextmanager
def _working_in(folder: Path, plan: str, held_out: bool) -> Iterator[None]:
    """Take the folder: new or empty, or that of a run with the same plan which did not end."""
    from trainer.data.tokenize_worker import VALIDATION, WORK

    work = folder / WORK
    if folder.exists() and not work.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty\n  choose another --out, or remove that folder")
    work.mkdir(parents=True, exist_ok=True)
    if held_out:
        (folder / VALIDATION).mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another octavo tokenize is writing here\n  wait for it") from None
        plan_file = work / _PLAN_FILE
        begun = any(work.glob("unit-*.json"))  # without one, nothing is lost by another plan
        if begun and plan_file.is_file() and plan_file.read_text() != plan:
            raise ValueError(
                f"{folder}: an unfinished run of another source, tokenizer or set of options lies here\n"
                "  finish it as it was begun, choose another --out, or remove that folder"
            )
        plan_file.write_text(plan)
        for leftover in work.glob("*.tmp"):
            leftover.unlink()
        yield


def _run(job: Any, units: list[Any], workers: int) -> list[dict[str, Any]]:
    """Do all units that are not done; their records, in order."""
    from trainer.data.tokenize_worker import record_file, start_process, tokenize_unit

    records = {unit.number: _done(job.out, record_file(job.out, unit), job.dtype) for unit in units}
    left = [unit for unit in units if records[unit.number] is None]
    if len(left) < len(units):
        print(f"going on: {len(units) - len(left)} of {len(units)} shards are there already")
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Array("q", 2), context.Event()
    bar = _Bar(progress, sum(unit.size for unit in left), len(left))
    pool = ProcessPoolExecutor(min(workers, max(1, len(left))), context, start_process, (job, progress, stop))
    try:
        futures = {pool.submit(tokenize_unit, unit): unit.number for unit in left}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                records[futures[future]] = future.result()
            bar.show(len(left) - len(waiting))
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was ended (often: the machine ran out of memory)\n"
            "  run the same command again, with fewer workers, to go on"
        ) from None
    except KeyboardInterrupt:
        stop.set()
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(_EXIT_INTERRUPTED) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        bar.end()
    return [record for unit in units if (record := records[unit.number]) is not None]


def _done(out: str, file: Path, dtype: str) -> dict[str, Any] | None:
    """The record of a unit whose shards are there."""
    from trainer.data.token_manifest import ITEM_BYTES, idx_bytes

    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    for part, shard in record["shards"].items():
        if shard is None:
            continue
        place = Path(out) / part / shard["name"]
        sizes = {
            ".bin": shard["tokens"] * ITEM_BYTES[dtype],
            ".idx": idx_bytes(shard["tokens"], shard["documents"], dtype),
        }
        for suffix, size in sizes.items():
            found = Path(f"{place}{suffix}")
            if not found.is_file() or found.stat().st_size != size:
                return None
    return record


class _Bar:
    """The progress: one line that is drawn anew on a terminal, now and then a line elsewhere."""

    def __init__(self, progress: Any, total_bytes: int, units: int) -> None:
        self._progress, self._total, self._units = progress, total_bytes, units
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.perf_counter()
        self._every = 0.5 if self._terminal else 30.0

    def show(self, done_units: int) -> None:
        """Draw, where it is time to."""
        now = time.perf_counter()
        if now - self._shown < self._every or self._units == 0:
            return
        self._shown = now
        source, text = self._progress[0], self._progress[1]
        share = source / self._total if self._total else done_units / self._units
        seconds = now - self._started
        left = f"{seconds / share - seconds:,.0f}s left" if share > 0.01 else "..."
        width = 24
        drawn = "#" * int(share * width)
        line = (
            f"[{drawn:<{width}}] {share:4.0%}  shard {done_units} of {self._units}  "
            f"{text / 1e6:,.0f} MB of text  {text / 1e6 / seconds:,.1f} MB/s  {left}"
        )
        print(
            f"\r{line}\033[K" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr
        )

    def end(self) -> None:
        """Leave the terminal's line clean."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr)


def _write_index(
    folder: Path, part: str, records: list[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write a folder's index and copy the tokenizer; the totals."""
    from trainer.data.token_manifest import FORMAT, INDEX_FILE, VERSION

    shards: list[dict[str, Any]] = []
    before = None
    for record in records:
        shard = record["shards"].get(part)
        if shard is not None:
            # What a shard goes on with is in the shard before, unless nothing of that could be read.
            shards.append({**shard, "continues": shard["continues"] and before is not None})
        before = shard
    totals = {
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] - shard["continues"] for shard in shards),
    }
    if part == "":
        keys = ("text_bytes", "empty", "skipped")
        totals |= {key: sum(record[key] for record in records) for key in keys}
        totals["longest"] = max((record["longest"] for record in records), default=0)
    if not shards:
        what = "nothing was held out for validation" if part else "the source holds no text"
        raise ValueError(f"{folder}: {what}, so there is nothing to write\n  look at the source")
    tokenizer = facts["tokenizer"]
    _copy_tokenizer(tokenizer.file, folder / "tokenizer")
    values = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": facts["dtype"],
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "source": facts["source"],
        "plan": facts["plan"],
        "totals": totals,
        "shards": shards,
    }
    scratch = folder / f"{INDEX_FILE}.tmp"
    scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, folder / INDEX_FILE)
    return totals


def _copy_tokenizer(file: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in (file.name, "tokenizer_config.json"):
        source = file.with_name(name)
        if source.is_file():
            shutil.copyfile(source, folder / name)


def _report(folder: Path, totals: dict[str, Any], records: list[dict[str, Any]]) -> None:
    ratio = totals["text_bytes"] / max(1, totals["tokens"])
    print(
        f"{folder}: {totals['tokens']:,} tokens of {totals['documents']:,} documents "
        f"({totals['text_bytes'] / 1e6:,.1f} MB of text, {ratio:.2f} bytes a token, longest piece "
        f"{totals['longest']:,} tokens)"
    )
    if totals["empty"]:
        print(f"  {totals['empty']:,} empty documents are left out")
    if totals["skipped"]:
        print(f"  {totals['skipped']:,} documents or files could not be read and are left out, the first:")
        first = [line for record in records for line in record["first_skipped"]]
        for line in first[:5]:
            print(f"    {line}")
    print(f"  train with: --training.dataset=token_files --training.dataset_path={folder}")
