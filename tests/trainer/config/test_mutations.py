"""Mutated files and command lines: never a traceback, and the nearest name is the one that was meant."""

import random
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import checks
from trainer.config.errors import ConfigError
from trainer.config.job import JobConfig
from trainer.config.load import load
from trainer.config.schema import read_schema

KEYS = list(read_schema(JobConfig).keys)
VALUES = [
    "3",
    "-1",
    "1.5",
    "1e400",
    '"text"',
    "true",
    "[1, 2]",
    '["a", "b"]',
    "{a = 1}",
    "nan",
    "''",
    "2024-01-01",
]


def quietly(argv):
    """Load and check; anything but success or ConfigError fails the test."""
    try:
        loaded = load(argv, env={})
        checks.problems(loaded, 2), checks.warnings(loaded), checks.unavailable(loaded)
    except ConfigError as error:
        for problem in error.problems:
            assert str(problem).count("\n") < 3
            assert problem.message


def mutated(word, rng):
    """One slip of the finger: a letter lost, doubled, replaced, or two exchanged."""
    spot = rng.randrange(1, len(word) - 1)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return rng.choice(
        [
            word[:spot] + word[spot + 1 :],
            word[:spot] + word[spot] + word[spot:],
            word[:spot] + letter + word[spot + 1 :],
            word[:spot] + word[spot + 1] + word[spot] + word[spot + 2 :],
        ]
    )


def test_typos_of_keys_find_their_key():
    rng = random.Random(0)
    tried = found = 0
    for name in KEYS:
        if name.startswith(("job.custom", "experimental.custom")):
            continue
        section, _, leaf = name.rpartition(".")
        if len(leaf) < 4:
            continue
        for _ in range(3):
            typo = f"{section}.{mutated(leaf, rng)}"
            if typo in KEYS:
                continue
            tried += 1
            try:
                load([f"--{typo}=1"], env={})
            except ConfigError as error:
                found += f"did you mean '{name}'" in str(error)
    assert found / tried > 0.95, f"{found} of {tried}"


def test_typos_of_sections_find_their_section(tmp_path):
    rng = random.Random(1)
    sections = [name for name in read_schema(JobConfig).sections if name]
    tried = found = 0
    path = tmp_path / "run.toml"
    for name in sections:
        for _ in range(5):
            head, _, leaf = name.rpartition(".")
            typo = f"{head}.{mutated(leaf, rng)}".lstrip(".") if len(leaf) > 3 else None
            if typo is None or typo in sections:
                continue
            tried += 1
            path.write_text(f"[{typo}]\nsome_key = 1\n")
            try:
                load([f"--job.config_file={path}"], env={})
            except ConfigError as error:
                found += f"did you mean '{name}'" in str(error)
    assert found / tried > 0.95, f"{found} of {tried}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_command_line_breaks_the_loader(data):
    keys = [key for key in KEYS if "custom" not in key and key != "job.config_file"]
    words = st.one_of(
        st.sampled_from(keys).map(lambda key: f"--{key}"),
        st.tuples(
            st.sampled_from(keys), st.sampled_from(["1", "-1", "true", "", "a,b", "[", "none", "x" * 80])
        ).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        st.sampled_from(
            ["--no-compile.enable", "--", "-h", "1", "-1", "--=", "--+=a", "--model.converters+=x", ""]
        ),
        st.text(min_size=1, max_size=12).filter(lambda text: "\0" not in text),
    )
    quietly(data.draw(st.lists(words, max_size=6)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_breaks_the_loader(data, tmp_path_factory):
    key = st.sampled_from([key for key in KEYS if "custom" not in key and key != "job.config_file"])
    lines = []
    for name in data.draw(st.lists(key, max_size=5)):
        section, _, leaf = name.rpartition(".")
        value = data.draw(st.sampled_from(VALUES))
        lines.append(f"[{section}]\n{leaf} = {value}\n")
    text = "".join(lines)
    if data.draw(st.booleans()) and text:
        spot = data.draw(st.integers(0, len(text) - 1))
        text = (
            text[:spot] + data.draw(st.sampled_from(["", "[", '"', "=", "\n", "é", "."])) + text[spot + 1 :]
        )
    path = tmp_path_factory.mktemp("fuzz") / "run.toml"
    path.write_text(re.sub(r"config_file|custom_\w+", "x", text))
    quietly([f"--job.config_file={path}"])


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "run.toml"
    for content in (b"\xff\xfe", b"[training]\nsteps = \x00\n", b"a" * 10_000, b"[" * 5_000):
        path.write_bytes(content)
        quietly([f"--job.config_file={path}"])
