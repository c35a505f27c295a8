"""Checkpoints on storage that is no disk: fsspec's memory and local backends, and web servers to read."""

import functools
import http.server
import os
import threading

import fsspec
import pytest
import torch

from trainer.checkpoint import folders
from trainer.checkpoint.choose import choose, is_complete
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import read_records, verify
from trainer.checkpoint.manifest import open_checkpoint
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.reader import read_tensors
from trainer.checkpoint.remote import RemotePath, as_place
from trainer.cli import main
from trainer.config.errors import ConfigError


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    """An empty folder on each backend; with "local", fsspec opens files of this disk."""
    url = "memory://runs/a" if request.param == "memory" else f"local://{tmp_path}/a"
    fs, path = fsspec.core.url_to_fs("memory://runs")
    if fs.exists(path):
        fs.rm(path, recursive=True)
    return as_place(url)


class WithRanges(http.server.SimpleHTTPRequestHandler):
    """Sends a part of a file where one is asked for, as real servers do."""

    asked = 0

    def do_GET(self):
        wanted = self.headers.get("Range")
        if not wanted:
            super().do_GET()
            return
        type(self).asked += 1
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class WithoutRanges(http.server.SimpleHTTPRequestHandler):
    """Python's own server: it sends whole files only."""

    def log_message(self, *args):
        pass


@pytest.fixture(params=[WithRanges, WithoutRanges])
def serve(request):
    """serve(folder) -> (URL, handler class)."""
    pytest.importorskip("aiohttp")
    servers = []

    def start(folder):
        handler = functools.partial(request.param, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://localhost:{server.server_address[1]}", request.param

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def newest(root, **settings):
    return choose(CheckpointConfig(**settings), root, Ranks())


def content_of(folder, manifest, like):
    got = {key: torch.zeros_like(value) for key, value in like.items()}
    read_tensors(folder, manifest, got)
    return got


def test_a_place_is_a_path_or_a_url():
    assert as_place("file:///a/b") == as_place("/a/b")
    place = as_place("s3://bucket/run/")
    assert (place.name, str(place.parent), str(place / "step-1")) == (
        "run",
        "s3://bucket",
        "s3://bucket/run/step-1",
    )
    assert str(as_place("ftp://me:secret@host/a")) == "ftp://host/a"


def test_what_is_saved_is_what_is_loaded(store, save, tensors_of):
    for step in (1, 2, 3):
        save(store, step)
    found = newest(store)
    assert found.manifest.step == 3
    got, wanted = content_of(found.folder, found.manifest, tensors_of(3)), tensors_of(3)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert folders.prune(store, 2, 3, is_complete) == [1]
    assert set(store.listing()) == {"step-2", "step-3"}


def test_a_step_without_its_marker_is_none(store, save, caplog):
    save(store, 1)
    (save(store, 2) / "COMPLETE").remove()
    assert newest(store).manifest.step == 1
    assert "COMPLETE: is missing" in caplog.text
    assert newest(save(store, 2).parent).manifest.step == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
def test_a_damaged_file_is_named_and_the_step_before_taken(store, save, caplog, damage):
    save(store, 1)
    file = save(store, 2) / "rank-00000.safetensors"
    content = bytearray(file.read())
    content[-1] ^= 1
    file.remove()
    if damage != "deleted":
        file.write(bytes(content[:-1] if damage == "cut" else content))
    assert newest(store).manifest.step == 1
    assert "rank-00000.safetensors: " in caplog.text


@pytest.mark.parametrize(("call", "nth"), [("open", 1), *(("pipe_file", n) for n in (1, 2, 3))])
def test_a_store_that_fails_a_save_keeps_the_one_before(store, save, monkeypatch, call, nth):
    """R12 on remote storage: the tensors' file, the manifest, integrity.json and the marker."""
    save(store, 1)
    backend = type(fsspec.core.url_to_fs(str(store))[0])
    real, calls = getattr(backend, call), []

    def broken(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == nth:
            raise RuntimeError("503 Slow Down")  # no OSError, as backends do
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(backend, call, broken)
    with pytest.raises(CheckpointError, match="503 Slow Down") as caught:
        save(store, 2)
    assert len(str(caught.value).splitlines()) <= 3
    monkeypatch.undo()
    assert set(store.listing()) == {"step-1"}
    verify(store / "step-1")


def test_a_run_saves_to_and_resumes_from_a_url(run, store):
    flag = f"--checkpoint.folder={store}"
    whole = run(name="whole")
    run(flag, "--training.steps=2", "--checkpoint.async_mode=async", name="parts")
    parts = run(flag, name="parts")
    assert f"resumed from {store}/step-2" in parts.log
    assert whole.losses == parts.losses
    assert parts.checkpoints == []
    written = read_records(store / "step-4")["rank-00000.safetensors"]
    assert written == read_records(whole.folder / "checkpoint" / "step-4")["rank-00000.safetensors"]


def test_weights_come_from_a_web_server(run, serve):
    source = run(name="source")
    url, handler = serve(source.folder / "checkpoint")
    for place in (url, f"{url}/step-4"):
        started = run(f"--checkpoint.initial_load_path={place}", "--training.steps=1", name=place[-1])
        assert f"weights from {url}/step-4" in started.log
        assert started.losses[0] == pytest.approx(source.losses[-1], rel=0.2)
    assert getattr(handler, "asked", 1) > 0
    path = source.folder / "checkpoint" / "step-4" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: its checksum differs"):
        run(f"--checkpoint.initial_load_path={url}/step-4", "--training.steps=1", name="broken")


def test_a_server_that_cannot_be_written_to_is_met_before_the_first_step(run, serve, tmp_path):
    url, _ = serve(tmp_path)
    with pytest.raises(CheckpointError, match=f"{url}/run cannot be written to"):
        run(f"--checkpoint.folder={url}/run")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--checkpoint.folder=s4://bucket/a", "'s4' is not a protocol that fsspec knows"),
        ("--checkpoint.initial_load_path=gs://bucket/a", "gs:// needs a package that is not installed"),
    ],
)
def test_a_protocol_that_is_not_there_is_a_bad_setting(run, flag, expected):
    with pytest.raises(ConfigError, match=expected):
        run(flag)


def test_the_command_reads_urls(tmp_path, save, capsys):
    url = f"local://{tmp_path}/a"
    for step in (1, 2, 3):
        save(as_place(url), step)
    assert main(["checkpoint", "list", url]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["step", "1", "2", "3"]
    assert main(["checkpoint", "verify", url]) == 0
    assert main(["checkpoint", "show", f"{url}/step-2"]) == 0
    assert main(["checkpoint", "prune", url, "--keep", "2"]) == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["step-2", "step-3"]
    open_checkpoint(RemotePath(url) / "step-3")
    assert main(["checkpoint", "list", "s4://x"]) == 2
    assert main(["checkpoint", "list", "http://localhost:1/none"]) == 4
