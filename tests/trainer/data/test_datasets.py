from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.data import hugging_face
from trainer.data.datasets import DATASETS, check_dataset, dataset_note, dataset_row
from trainer.data.documents import DocumentOrder
from trainer.data.python_sources import is_held_out

FIRST_EPOCH = DocumentOrder()


def names(dataset: str, order: DocumentOrder = FIRST_EPOCH, path: str | None = None) -> list[str]:
    return [document.name for document in DATASETS[dataset].documents(path, order)]


def test_the_held_out_part_is_disjoint_complete_and_stable():
    training, validation = names("python_sources"), names("python_sources_validation")
    assert len(training) > 300
    assert 0.02 < len(validation) / (len(training) + len(validation)) < 0.09
    assert set(training).isdisjoint(validation)
    assert set(training) | set(validation) >= {"enum.py", "json/decoder.py", "asyncio/locks.py"}
    assert len(set(training)) == len(training)
    # A file's part depends on its relative path alone: these stay put on every machine and version.
    assert is_held_out("asyncio/locks.py")
    assert not is_held_out("enum.py")


def test_python_sources_leave_out_packages_and_tests():
    parts = {part for name in names("python_sources") for part in name.split("/")[:-1]}
    assert parts.isdisjoint({"site-packages", "test", "tests", "idle_test", "__pycache__"})


def test_the_order_is_a_function_of_seed_and_epoch():
    first = names("python_sources", DocumentOrder(seed=1))
    assert names("python_sources", DocumentOrder(seed=1)) == first
    for other in (DocumentOrder(seed=2), DocumentOrder(seed=1, epoch=1)):
        again = names("python_sources", other)
        assert again != first
        assert sorted(again) == sorted(first)
    assert names("python_sources", DocumentOrder(seed=1, start=100)) == first[100:]


def test_python_sources_of_another_folder(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("no")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    documents = list(DATASETS["python_sources"].documents(str(tmp_path), DocumentOrder()))
    assert [document[:2] for document in documents] == [("latin.py", "# -*- coding: latin-1 -*-\nx = 'é'\n")]
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    with pytest.raises(ValueError, match=r"latin\.py: cannot be decoded as Python source"):
        names("python_sources", path=str(tmp_path))
    with pytest.raises(ValueError, match="no such folder of Python files"):
        check_dataset("python_sources", str(tmp_path / "absent"))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"'pyton_sources'; did you mean 'python_sources'\?"):
        dataset_row("pyton_sources")


def test_c4_test_is_a_stand_in_and_says_so(tmp_path):
    assert names("c4_test") == names("python_sources")
    assert "stand in" in (dataset_note("c4_test") or "")
    (tmp_path / "data.json").write_text('{"text": "one", "url": "u"}\n')
    assert names("c4_test", path=str(tmp_path)) == ["data.json:1"]
    assert dataset_note("c4_test", str(tmp_path)) is None


def test_c4_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hugging_face.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'octavo\[hf\]'"):
        check_dataset("c4")


def test_the_table_imports_neither_torch_nor_a_tokenizer():
    code = (
        "import sys, trainer.data.datasets\n"
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
