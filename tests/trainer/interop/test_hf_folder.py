"""Foreign folders: hostile, damaged or of another model, each refused in at most three lines."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.checkpoint.files import CheckpointError
from trainer.cli import main
from trainer.interop import hf_read
from trainer.interop.hf_folder import open_hf_folder
from trainer.interop.hf_read import read_hf

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        open_hf_folder(folder)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, message
    return message


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(folder, change):
    """Apply `change` to the tensors of the file that holds Q; the index follows."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][Q]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    names = {name: where for name, where in index["weight_map"].items() if where != file}
    index["weight_map"] = {**names, **dict.fromkeys(tensors, file)}
    (folder / INDEX).write_text(json.dumps(index))


class Pwned:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_pickles_are_refused_and_not_opened(tiny_hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, folder = tiny_hf
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Pwned()))
    message = refused(folder, "pickles", "pytorch_model.bin", "safetensors", "save_pretrained")
    assert len(message.splitlines()) == 3
    assert main(["generate", str(folder), "--prompt", "a"]) == 4
    assert not (tmp_path / "pwned").exists()


def test_code_in_the_folder_is_never_run(tiny_hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, folder = tiny_hf
    for name in ("modeling_llama.py", "configuration.py", "conftest.py"):
        (folder / name).write_text("open('pwned', 'w').close()\n")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "names code (auto_map): it is not used" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", 7]
)
def test_file_names_of_the_index(tiny_hf, name):
    _, folder = tiny_hf
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, "is not the name of a file beside it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q), ["missing", Q]),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
            ["not expected", "bias"],
        ),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(192, 64)}), ["not expected"]),
        (lambda t: t.update({Q: torch.zeros(64, 32)}), ["wrong shape", Q, "[64, 32]", "[64, 64]"]),
        (lambda t: t.update({Q: torch.zeros(64, 64).to(torch.float8_e4m3fn)}), ["F8_E4M3"]),
        (lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)}), [Q, "I8"]),
    ],
)
def test_tensors_that_are_not_the_models(tiny_hf, change, words):
    _, folder = tiny_hf
    edit_tensors(folder, change)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mistral"}, "'mistral' is not supported"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_size": ...}, "hidden_size missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3}, "head_dim"),
        ({"num_key_value_heads": 3}, "n_kv_heads must divide"),
        ({"vocab_size": 2049}, "wrong shape"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"rope_scaling": [8]}, "rope_scaling is [8]"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_configs(tiny_hf, changes, word):
    _, folder = tiny_hf
    edit_json(folder / "config.json", **changes)
    refused(folder, word)


def test_damaged_files(tiny_hf):
    _, folder = tiny_hf
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    for damaged in (
        content[:-10],
        content[:4],
        b"",
        b"\xff" * 8 + content[8:],
        b"version https://git-lfs\n" * 4,
    ):
        file.write_bytes(damaged)
        refused(folder, file.name, "not a whole safetensors file")
    file.unlink()
    refused(folder, file.name, "is missing")
    os.mkfifo(file)
    refused(folder, file.name, "not a regular file")
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert "root:" not in refused(folder, file.name, "not a whole safetensors file")
    file.unlink()
    file.write_bytes(content)
    for text in ("{", "[]", "[" * 100_000, '{"weight_map": {}}', '{"weight_map": 3}'):
        kept = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text)
        refused(folder, INDEX)
        (folder / INDEX).write_text(kept)
    open_hf_folder(folder)
    (folder / INDEX).unlink()
    refused(folder, "has neither model.safetensors nor")
    (folder / "config.json").unlink()
    refused(folder, "config.json: is missing")
    refused(folder / "nowhere", "no such folder")


def test_the_cache_of_the_hub_is_made_of_links(tiny_hf, tmp_path):
    model, folder = tiny_hf
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        blob = tmp_path / f"blob{number}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    target = torch.empty_like(model.norm.weight)
    read_hf(open_hf_folder(snapshot), {"norm.weight": target})
    assert torch.equal(target, model.norm.weight)


def test_old_exports_have_more_and_tied_ones_may_have_an_output(tiny_hf):
    _, folder = tiny_hf
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    open_hf_folder(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert "output.weight" not in open_hf_folder(folder).tensors


def test_a_rank_reads_its_rows_and_no_others(tiny_hf, monkeypatch):
    """A quarter of each tensor, whole heads of wq and wk; the values are those of the whole model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, folder = tiny_hf
    read = []

    class Slice:
        def __init__(self, stored):
            self.stored = stored

        def __getitem__(self, index):
            found = self.stored[index]
            read.append(found.numel())
            return found

    class Recording:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            return Slice(self.opened.get_slice(name))

    monkeypatch.setattr(hf_read, "safe_open", Recording)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        for dim, columns in ((0, False), (1, True)):
            read.clear()
            wide = {name: tensor for name, tensor in state.items() if tensor.dim() > dim}
            targets = {
                name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(dim)], src_data_rank=None)
                for name, tensor in wide.items()
            }
            read_hf(open_hf_folder(folder), targets)
            for name, target in targets.items():
                assert torch.equal(target.to_local(), wide[name].chunk(4, dim)[2]), (name, dim)
            # Only wk's two heads over four ranks are cut: half a head is wanted, a whole one read.
            extra = 0 if columns else 2 * 16 // 2 * 64
            assert sum(read) == sum(tensor.numel() // 4 for tensor in wide.values()) + extra
    finally:
        dist.destroy_process_group()
