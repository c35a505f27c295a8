"""A process that dies, and a disk that fails, at every call that touches the disk."""

import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from trainer.checkpoint import folders
from trainer.checkpoint.choose import choose, is_complete
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import verify
from trainer.checkpoint.ranks import Ranks

CALLS = ("open", "write", "fsync", "rename", "mkdir", "close")


def newest_step(root):
    found = choose(CheckpointConfig(), root, Ranks())
    verify(found.folder)
    return found.manifest.step


class Countdown:
    """Counts the calls of `os` that a save makes, and does something at the n-th, before or after it."""

    def __init__(self, monkeypatch, n, action, after=False):
        self.left, self.action, self.after = n, action, after
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call):
        def counted(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and not self.after:
                self.action()
            result = call(*args, **kwargs)
            if self.left == 0 and self.after:
                self.action()
            return result

        return counted


def calls_of_a_save(root, save, step, monkeypatch):
    with monkeypatch.context() as patch:
        counter = Countdown(patch, -1, lambda: None)
        save(root, step)
    return -1 - counter.left


def die_at(n, after, work, monkeypatch):
    """Run `work` in a child that kills itself at the n-th call; True where it did."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        Countdown(monkeypatch, n, lambda: os.kill(os.getpid(), signal.SIGKILL), after)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step that exists"])
def test_a_save_killed_at_any_call_is_complete_or_absent(tmp_path, save, monkeypatch, again):
    """R2: with the step before intact, and after cleaning up nothing left of the broken one."""
    total = calls_of_a_save(tmp_path / "count", save, 2, monkeypatch)
    seen = set()
    for n in range(1, total + 20):
        root = tmp_path / f"{n}"
        save(root, 1)
        if again:
            save(root, 2)
        died = die_at(n, n % 2 == 0, lambda root=root: save(root, 2), monkeypatch)
        if not died:
            break
        folders.clean_leftovers(root)
        step = newest_step(root)
        assert step == 2 if again else step in (1, 2)
        assert {name for name in os.listdir(root) if not folders.step_of(name)} == set()
        verify(root / "step-1")
        seen.add(step)
        shutil.rmtree(root)
    assert not died, "the save went on for more calls than were counted"
    assert n > 15
    assert seen == ({2} if again else {1, 2})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_save_that_fails_at_any_call_leaves_nothing(tmp_path, save, monkeypatch, code):
    """R12: former checkpoints stay as they were, and the message has path, needed and free bytes."""
    root = tmp_path / "checkpoint"
    save(root, 1)
    total = calls_of_a_save(tmp_path / "count", save, 2, monkeypatch)

    def fail():
        raise OSError(code, os.strerror(code))

    failures = 0
    for n in range(1, total + 1):
        with monkeypatch.context() as patch:
            Countdown(patch, n, fail)
            try:
                save(root, 2)
            except CheckpointError as error:
                failures += 1
                text = str(error)
                assert str(root / "step-2") in text
                assert os.strerror(code) in text
                assert "bytes" in text
                assert "are free" in text
                assert len(text.splitlines()) <= 3
        # Renamed and then not synced: the message says it failed, the folder is whole.
        if (root / "step-2").exists():
            verify(root / "step-2")
            shutil.rmtree(root / "step-2")
        assert [path.name for path in root.iterdir()] == ["step-1"], n
        verify(root / "step-1")
    assert failures >= total - 1


def test_a_full_disk_is_seen_before_anything_is_written(root, save, monkeypatch):
    save(root, 1)
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError) as caught:
        save(root, 2)
    assert "step-2 was not saved: the disk is full" in str(caught.value)
    assert "1,000 are free" in str(caught.value)
    assert os.listdir(root) == ["step-1"]


def in_a_child(work):
    """Run `work` in a child; returns the message of its CheckpointError, "" where there was none."""
    read, write = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            work()
            os.write(write, b"")
        except CheckpointError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    os.wait()
    return message


def test_the_kernel_ends_a_write_in_its_middle(root, save, tensors_of):
    """R12 with a real error: a file may not grow beyond a limit that the free space does not show."""
    save(root, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save(root, 2, {**tensors_of(2), "model.c": torch.zeros(5000)})

    message = in_a_child(work)
    assert message.splitlines()[0] == f"{root / 'step-2'} was not saved: {os.strerror(errno.EFBIG)}"
    assert "bytes, " in message
    assert "are free there; former checkpoints are as they were" in message
    assert os.listdir(root) == ["step-1"]
    verify(root / "step-1")


def test_a_disk_fills_up_while_a_save_is_written(tmp_path, save, monkeypatch):
    """R12 on a real file system of two megabytes, whose free space is not seen in time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        save(disk, 1)
        usage = shutil.disk_usage(disk)
        seen = iter([usage._replace(free=2**30)])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(seen, usage))
        with pytest.raises(CheckpointError) as caught:
            save(disk, 2, {"model.c": torch.zeros(700_000)})
        assert "step-2 was not saved: No space left on device" in str(caught.value)
        assert f"{usage.free:,} are free there" in str(caught.value)
        assert os.listdir(disk) == ["step-1"]
        verify(disk / "step-1")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_many_saves_leave_nothing_open(root, save):
    """R17, short: memory, descriptors, threads and the folder after 30 saves and after 130."""
    process, seen = psutil.Process(), []
    for step in range(1, 131):
        save(root, step)
        folders.prune(root, 3, step, is_complete)
        if step in (30, 130):
            gc.collect()
            seen.append((process.num_fds(), process.num_threads(), len(os.listdir(root))))
            seen.append(process.memory_info().rss)
    assert seen[0] == seen[2]
    assert seen[0][2] == 3
    assert seen[3] - seen[1] < 8 * 2**20


def test_a_root_that_is_a_file(tmp_path, save):
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(CheckpointError, match="was not saved"):
        save(tmp_path / "checkpoint", 1)


def test_pruning_keeps_the_newest_valid_ones(root, save):
    for step in range(1, 7):
        save(root, step)
    (root / "step-5" / "COMPLETE").unlink()
    assert folders.prune(root, 3, 6, is_complete) == [1, 2]
    assert sorted(os.listdir(root)) == ["step-3", "step-4", "step-5", "step-6"]
    assert folders.prune(root, 0, 6, is_complete) == []


def test_pruning_keeps_what_was_just_saved_even_where_later_steps_exist(root, save):
    for step in (2, 8, 9):
        save(root, step)
    assert folders.prune(root, 2, 2, is_complete) == [8]
    assert sorted(os.listdir(root)) == ["step-2", "step-9"]


def test_pruning_and_cleaning_touch_nothing_else(root, save, tmp_path):
    """Neighbours whose names look alike, and links that lead out of the folder."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    others = [
        "step-1.bak",
        "step-01",
        "step-",
        "steps-1",
        "my-step-1",
        "step-1.tmp-zz",
        "step-1.tmp-12345678x",
    ]
    for name in others:
        (root / name).mkdir()
    (root / "step-1").symlink_to(tmp_path / "precious")
    (root / "step-2.tmp-12345678").symlink_to(tmp_path / "precious")
    (root / "step-3").write_text("a file")
    for step in (7, 8, 9):
        save(root, step)
    (root / "step-7" / "link").symlink_to(tmp_path / "precious")
    assert folders.prune(root, 2, 9, is_complete) == [7]
    assert folders.clean_leftovers(root) == []
    kept = {*others, "step-1", "step-2.tmp-12345678", "step-3", "step-8", "step-9"}
    assert set(os.listdir(root)) == kept
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_leftovers_are_removed_and_what_was_replaced_is_put_back(root, save):
    save(root, 4)
    save(root, 5).rename(root / "step-5.old-0123abcd")
    (root / "step-6.tmp-0123abcd").mkdir()
    save(root, 3).rename(root / "step-3.gone-0123abcd")
    assert len(folders.clean_leftovers(root)) == 3
    assert sorted(os.listdir(root)) == ["step-4", "step-5"]
    assert newest_step(root) == 5


def test_two_runs_do_not_save_into_one_folder(root):
    held = folders.lock(root)
    with pytest.raises(CheckpointError, match="is in use: another run"):
        folders.lock(root)
    os.close(held)
    os.close(folders.lock(root))
