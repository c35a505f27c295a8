"""What is written is what is read; what is damaged or hostile is refused with the file's name."""

import contextlib
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors import safe_open

from trainer.checkpoint.choose import choose
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import FileRecord, read_records, record_of, seal, verify, verify_files
from trainer.checkpoint.manifest import MANIFEST_FILE, open_checkpoint
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.reader import read_tensors
from trainer.checkpoint.writer import Box, assign

RANK_FILE = "rank-00000.safetensors"


def newest(root, **settings):
    return choose(CheckpointConfig(**settings), root, Ranks())


def check(folder):
    """All that a load checks before it reads tensors."""
    records, manifest = open_checkpoint(folder)
    verify_files(folder, records)
    return manifest


def reseal(folder):
    """Make integrity.json match the files that are there, as a forger would."""
    records = {
        path.name: record_of(path.read_bytes())
        for path in folder.iterdir()
        if path.name not in ("integrity.json", "COMPLETE")
    }
    for name in ("integrity.json", "COMPLETE"):
        (folder / name).unlink()
    seal(folder, records)


def edit_manifest(folder, change):
    document = json.loads((folder / MANIFEST_FILE).read_text())
    change(document)
    (folder / MANIFEST_FILE).write_text(json.dumps(document))
    reseal(folder)


def test_tensors_come_back_bit_for_bit(root, save, tensors_of):
    folder = save(root, 3)
    manifest, wanted = check(folder), tensors_of(3)
    got = {key: torch.zeros_like(value) for key, value in wanted.items()}
    read_tensors(folder, manifest, got)
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key
    assert manifest.step == 3
    assert manifest.train_state["tokens_seen"] == 30


def test_the_data_files_are_plain_safetensors(root, save, tensors_of):
    folder = save(root, 3)
    with safe_open(str(folder / RANK_FILE), framework="pt") as file:
        assert torch.equal(file.get_tensor("model.a.weight@0,0"), tensors_of(3)["model.a.weight"])
        assert set(file.keys()) == {box.name for box in _boxes(check(folder))}


def _boxes(manifest):
    return [c for entry in manifest.tensors.values() for c in entry.chunks]


def test_a_box_is_written_once_by_the_least_loaded_of_its_holders():
    shared = [Box(f"model.n{i}", (0,), (10,), (10,), "F32") for i in range(4)]
    shards = [Box("model.w", (half,), (8,), (16,), "F32") for half in (0, 8)]
    plan = assign([[shards[0], *shared], [shards[1], *shared]])
    assert sorted(box.name for boxes in plan for box in boxes) == sorted(b.name for b in [*shards, *shared])
    assert [sum(box.nbytes for box in boxes) for boxes in plan] == [112, 112]


def test_every_flipped_bit_is_found_and_the_file_named(root, save):
    """R3: 100 random bits over all files of a checkpoint."""
    save(root, 1)
    folder = save(root, 2)
    dice = random.Random(0)
    files = sorted(folder.iterdir())
    for _ in range(100):
        path = dice.choice(files)
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            check(folder)
        # A flip in the marker and one in integrity.json look alike: they do not match each other.
        assert str(caught.value).startswith((path.name, "integrity.json"))
        assert newest(root).manifest.step == 1
        path.write_bytes(original)
    assert newest(root).manifest.step == 2


@pytest.mark.parametrize("name", [RANK_FILE, MANIFEST_FILE, "integrity.json", "COMPLETE"])
@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "deleted", "swapped", "symlink", "folder", "fifo"]
)
def test_a_damaged_file_is_named_and_the_step_before_taken(root, save, caplog, name, damage):
    """R4: and none of it blocks or follows a link."""
    other, folder = save(root, 1), save(root, 2)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "swapped":
        shutil.copy(other / name, path)
    elif damage == "symlink":
        (root / "elsewhere").write_bytes(content)
        path.symlink_to(root / "elsewhere")
    elif damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    assert newest(root).manifest.step == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"skipped {folder}: ")
    assert name in line or "integrity.json" in line
    with pytest.raises(CheckpointError) as caught:
        newest(root, load_step=2)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_symlinked_step_is_no_checkpoint(root, save, tmp_path):
    save(root, 1)
    shutil.move(save(root, 2), tmp_path / "step-2")
    (root / "step-2").symlink_to(tmp_path / "step-2")
    assert newest(root).manifest.step == 1


def test_steps_that_are_there_but_none_valid_end_the_run(root, save):
    (save(root, 1) / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used, 1 were tried"):
        newest(root)


def test_a_step_that_was_asked_for_and_is_not_there(root, save):
    save(root, 1)
    with pytest.raises(CheckpointError, match=r"load_step = 7: no step-7 in .*\n  it has steps 1"):
        newest(root, load_step=7)


def test_a_model_only_checkpoint_is_not_resumed_from_but_started_from(root, save, caplog):
    save(root, 1)
    save(root, 2, content="model")
    assert newest(root).manifest.step == 1
    assert "holds the model only" in caplog.text
    elsewhere = root.parent / "fresh"
    assert newest(elsewhere, initial_load_path=str(root)).manifest.step == 2
    assert newest(elsewhere, initial_load_path=str(root / "step-1")).manifest.step == 1
    assert not newest(elsewhere, initial_load_path=str(root)).is_own
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        newest(elsewhere, initial_load_path="/no/such")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [RANK_FILE, MANIFEST_FILE, "integrity.json", "COMPLETE", ".metadata"])
def test_a_pickle_in_any_file_is_not_run(root, save, tmp_path, name):
    """R5: with checksums that fit, since a stranger can write those too."""
    folder = save(root, 2)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    if name in (RANK_FILE, MANIFEST_FILE):
        reseal(folder)
    with contextlib.suppress(CheckpointError) if name == ".metadata" else pytest.raises(CheckpointError) as e:
        read_tensors(folder, check(folder), {"model.a.weight": torch.zeros(7, 5)})
    message = str(e.value) if e is not None else name  # no one asks for .metadata
    assert name in message or "integrity.json" in message
    assert not (tmp_path / "executed").exists()


def _chunk(document, **values):
    document["tensors"]["model.a.weight"]["chunks"][0].update(values)


HOSTILE = {
    "file above the folder": lambda d: _chunk(d, file="../rank-00000.safetensors"),
    "absolute file": lambda d: _chunk(d, file="/etc/passwd"),
    "file that is not recorded": lambda d: _chunk(d, file="other.safetensors"),
    "negative offset": lambda d: _chunk(d, offsets=[-1, 0]),
    "chunk beyond the tensor": lambda d: _chunk(d, offsets=[1, 0]),
    "rank of another number": lambda d: _chunk(d, offsets=[0]),
    "float size": lambda d: _chunk(d, shape=[7.0, 5]),
    "bool size": lambda d: _chunk(d, shape=[True, 35]),
    "no chunk": lambda d: d["tensors"]["model.a.weight"].update(chunks=[]),
    "chunks is text": lambda d: d["tensors"]["model.a.weight"].update(chunks="abc"),
    "larger than its files": lambda d: d["tensors"]["model.a.weight"].update(
        shape=[2**40], chunks=[{"offsets": [0], "shape": [2**40], "file": RANK_FILE, "name": "x"}]
    ),
    "dtype of no one": lambda d: d["tensors"]["model.a.weight"].update(dtype="object"),
    "key of no kind": lambda d: d["tensors"].update({"../../x": d["tensors"]["model.a.weight"]}),
    "tensors is a list": lambda d: d.update(tensors=[]),
    "version of the future": lambda d: d.update(version=99),
    "another format": lambda d: d.update(format="torch"),
    "step is text": lambda d: d.update(step="2"),
    "another step": lambda d: d.update(step=3),
    "tokens are text": lambda d: d["train_state"].update(tokens_seen="many"),
    "schedule is negative": lambda d: d["lr_scheduler"].update(step=-1),
    "no data position": lambda d: d.pop("dataloader"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused(root, save, change):
    folder = save(root, 2)
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        check(folder)


def test_json_as_deep_as_the_sea_is_refused(root, save):
    folder = save(root, 2)
    (folder / MANIFEST_FILE).write_text("[" * 200_000)
    reseal(folder)
    with pytest.raises(CheckpointError, match="is not JSON"):
        check(folder)


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", ".hidden", "a/b", ""])
def test_integrity_may_name_no_file_elsewhere(root, save, name):
    folder = save(root, 2)
    for old in ("integrity.json", "COMPLETE"):
        (folder / old).unlink()
    seal(folder, {name: FileRecord(1, "0" * 16)})
    with pytest.raises(CheckpointError, match=r"integrity\.json"):
        read_records(folder)


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, (2**40).to_bytes(8, "little"), b'\x02\x00\x00\x00\x00\x00\x00\x00{"', b""],
    ids=["huge", "past the end", "cut", "nothing"],
)
def test_a_hostile_tensor_file_is_refused(root, save, header):
    folder = save(root, 2)
    manifest = check(folder)
    (folder / RANK_FILE).write_bytes(header)
    with pytest.raises(CheckpointError, match="rank-00000"):
        read_tensors(folder, manifest, {"model.a.weight": torch.zeros(7, 5)})


def test_a_tensor_of_another_shape_or_name_is_refused(root, save):
    folder = save(root, 2)
    manifest = check(folder)
    with pytest.raises(CheckpointError, match=r"model\.a\.weight of shape \[7, 5\], here it is \[5, 7\]"):
        read_tensors(folder, manifest, {"model.a.weight": torch.zeros(5, 7)})
    with pytest.raises(CheckpointError, match=r"has no model\.z"):
        read_tensors(folder, manifest, {"model.z": torch.zeros(5, 7)})


def test_verify_reads_everything(root, save):
    assert set(verify(save(root, 2))) == {RANK_FILE, MANIFEST_FILE}
