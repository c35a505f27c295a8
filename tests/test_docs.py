"""The documentation agrees with the project: links lead to files, flags and TOML keys exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models import MODELS
from trainer.config.aliases import ALIASES, rename
from trainer.config.command_line import read_command_line
from trainer.config.job import JobConfig
from trainer.config.load import load
from trainer.config.schema import OVERRIDES, Schema, read_schema, with_overrides

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What pages write to show a form, a mistake or a user's own key.
EXAMPLE_FLAGS = {"section.key", "a.b", "a.no_b", "training.setps", "team.budget_hours"}
# Pages whose TOML shows parts that a reader has yet to write.
TOML_OF_THE_READER = {"adding_a_model.md", "adding_a_converter.md"}

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--((?:no-)?[a-z_]\w*(?:\.[a-z_][\w-]*)+)")
CODE_PATH = re.compile(
    r"`(?:\./)?((?:trainer|models|converters|parallelisms|kernels|train_configs|tests)/[\w./]+\.\w+)`"
)
KEY_SPAN = re.compile(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`")
FILE_SUFFIXES = (".py", ".md", ".json", ".jsonl", ".toml", ".safetensors")
TOML_BLOCK = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def schema() -> Schema:
    """The built-in keys, with the fields of every model as overrides."""
    found = read_schema(JobConfig)
    for spec in MODELS.values():
        found = with_overrides(found, next(iter(spec.flavors.values())))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_exist(page: Path, schema: Schema) -> None:
    unknown = []
    for name in FLAG.findall(page.read_text()):
        key = read_command_line([f"--{name}"]).settings[0].key  # without no-
        if not {name, key} & EXAMPLE_FLAGS and rename(key) not in schema.keys:
            unknown.append(name)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page: Path) -> None:
    named = CODE_PATH.findall(page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_keys_in_code_spans_exist(page: Path, schema: Schema) -> None:
    """`training.steps` in the text is a key, an older name, or a section that is there."""
    known = {*schema.keys, *schema.sections, *EXAMPLE_FLAGS}
    sections = {name.partition(".")[0] for name in schema.keys}
    named = [name for name in KEY_SPAN.findall(page.read_text()) if name.partition(".")[0] in sections]
    unknown = [name for name in named if rename(name) not in known and not name.endswith(FILE_SUFFIXES)]
    assert unknown == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in TOML_OF_THE_READER], ids=page_id)
def test_toml_blocks_load(page: Path, tmp_path: Path) -> None:
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    for number, block in enumerate(TOML_BLOCK.findall(page.read_text())):
        file = tmp_path / f"block{number}.toml"
        file.write_text(block)
        load([f"--job.config_file={file}"], env={})


def test_every_page_is_on_the_map() -> None:
    index = ROOT / "docs" / "index.md"
    targets = LINK.findall(index.read_text())
    listed = {(index.parent / target.partition("#")[0]).resolve() for target in targets}
    missing = [page_id(page) for page in PAGES if page.is_relative_to(index.parent) and page not in listed]
    assert missing == ["docs/index.md"]


def test_older_names_lead_to_keys_that_exist(schema: Schema) -> None:
    assert [new for new in ALIASES.values() if new not in schema.keys and new not in schema.sections] == []
    assert OVERRIDES in schema.sections


@pytest.mark.parametrize("note", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=page_id)
def test_decisions_are_short(note: Path) -> None:
    assert len(note.read_text().splitlines()) <= 30
