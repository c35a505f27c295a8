"""Names, types, aliases, layering: what strict loading means, input by input."""

import pytest

from trainer.config.aliases import ALIASES
from trainer.config.errors import ConfigError
from trainer.config.load import load


def write(folder, text, name="run.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def load_toml(folder, text, *flags):
    return load([f"--job.config_file={write(folder, text)}", *flags], env={})


def messages(folder, text="", *flags):
    with pytest.raises(ConfigError) as caught:
        load_toml(folder, text, *flags)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_then_toml_then_flags(tmp_path):
    loaded = load_toml(tmp_path, "[training]\nsteps = 7\nseq_len = 64\n", "--training.steps=9")
    assert (loaded.config.training.steps, loaded.config.training.seq_len) == (9, 64)
    assert loaded.config.training.local_batch_size == 8
    assert loaded.origins["training.steps"] == "--training.steps"
    assert loaded.origins["training.seq_len"].endswith("run.toml:3")
    assert loaded.origins["training.local_batch_size"] == "default"


def test_config_file_from_the_environment(tmp_path):
    path = write(tmp_path, "[training]\nsteps = 3\n")
    assert load([], env={"CONFIG_FILE": path}).config.training.steps == 3
    other = write(tmp_path, "[training]\nsteps = 4\n", "other.toml")
    assert load([f"--job.config_file={other}"], env={"CONFIG_FILE": path}).config.training.steps == 4


def test_extends_chain_and_origin(tmp_path):
    write(tmp_path, "[training]\nsteps = 1\nseq_len = 32\n[optimizer]\nlr = 0.1\n", "a.toml")
    write(tmp_path, 'extends = "a.toml"\n[training]\nsteps = 2\n', "b.toml")
    loaded = load_toml(tmp_path, 'extends = "b.toml"\n[training]\nseq_len = 64\n')
    assert (loaded.config.training.steps, loaded.config.training.seq_len) == (2, 64)
    assert loaded.config.optimizer.lr == 0.1
    assert loaded.origins["optimizer.lr"].endswith("a.toml:5")


def test_extends_circle_is_refused(tmp_path):
    write(tmp_path, 'extends = "run.toml"\n', "b.toml")
    (message,) = messages(tmp_path, 'extends = "b.toml"\n')
    assert "circle" in message
    assert "b.toml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[trainig]\nsteps = 3\n", "did you mean 'training'"),
        ("[training]\nsetps = 3\n", "did you mean 'training.steps'"),
        ("[training]\nlr = 3e-4\n", "did you mean 'optimizer.lr'"),
        ("[quantize.linear.flaot8]\nemulate = true\n", "did you mean 'quantize.linear.float8'"),
        ("[training.dataloder]\nnum_workers = 0\n", "did you mean 'training.dataloader'"),
        ("[empty_one]\n", "unknown section 'empty_one'"),
        ("[model.overrides]\nn_layer = 3\n", "did you mean 'model.overrides.n_layers'"),
        ('[training]\nsteps = "100"\n', "got string '100'; allowed: an integer >= 1"),
        ("[training]\nsteps = 1.5\n", "got number 1.5; allowed: an integer >= 1"),
        ("[training]\nsteps = true\n", "got true; allowed: an integer"),
        ("[training]\nsteps = -5\n", "got -5; allowed: an integer >= 1"),
        ('[training]\ndtype = "fp16"\n', "got string 'fp16'; allowed: 'float32', 'bfloat16'"),
        ("[quantize.linear.float8]\nfilter_fqns = 3\n", "got integer 3; allowed: a list of strings"),
        ('[quantize.linear.float8]\nfilter_fqns = ["a", 3]\n', "got integer 3; allowed: a string"),
        ("[model.overrides]\nn_layers = 2.5\n", "got number 2.5; allowed: an integer"),
        ("[optimizer]\nlr = nan\n", "a finite number"),
        ("training = 3\n", "training"),
        ("[training.steps]\nx = 1\n", "training.steps is a key, not a section"),
        ("[activation_checkpoint]\nselective_ac_option = '0'\n", "'op' or a positive integer"),
    ],
)
def test_refusals_name_the_line_and_what_is_allowed(tmp_path, text, expected):
    found = messages(tmp_path, text)
    assert len(found) == 1
    assert expected in found[0]
    assert "run.toml:" in found[0]


def test_invalid_toml_and_missing_file(tmp_path):
    assert "not valid TOML" in messages(tmp_path, "[training\n")[0]
    write(tmp_path, "", "llama.toml")
    with pytest.raises(ConfigError, match=r"no such config file; in that folder: llama\.toml"):
        load([f"--job.config_file={tmp_path}/nothing.toml"], env={})


def test_all_problems_at_once(tmp_path):
    found = messages(
        tmp_path, "[training]\nsetps = 1\nseq_len = 'x'\n[opt]\nlr = 1\n", "--compile.enabel", "stray"
    )
    assert len(found) == 4  # "stray" is the value of the misspelt flag


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compile.enable"], True),
        (["--no-compile.enable"], False),
        (["--compile.no_enable"], False),
        (["--compile.no-enable"], False),
        (["--compile.enable=true"], True),
        (["--compile.enable=False"], False),
        (["--compile.enable", "true"], True),
        (["--compile.enable", "false"], False),
        (["--training.compile"], True),
        (["--no-training.compile"], False),
        (["--training.no-compile"], False),
    ],
)
@pytest.mark.parametrize("before", ["true", "false"])
def test_boolean_spellings(tmp_path, flags, expected, before):
    loaded = load_toml(tmp_path, f"[compile]\nenable = {before}\n", *flags)
    assert loaded.config.compile.enable is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], False),
        (["--x.keep"], True),
        (["--x.keep=off"], False),
        (["--no-x.keep"], False),
        (["--x.keep=auto"], "auto"),
    ],
)
def test_a_switch_may_be_auto(tmp_path, flags, expected):
    flags = [flag.replace("x.keep", "quantize.linear.float8.keep_float8_shards") for flag in flags]
    section = "[quantize.linear.float8]\nenable_fsdp_float8_all_gather = true\nkeep_float8_shards = "
    loaded = load_toml(tmp_path, f"{section}false\n", *flags)
    assert loaded.config.quantize.linear.float8.keep_float8_shards == expected
    loaded = load_toml(tmp_path, f'{section}"auto"\n')
    assert loaded.config.quantize.linear.float8.keep_float8_shards == "auto"


@pytest.mark.parametrize("value", ["perhaps", "1.5"])
def test_a_switch_says_what_it_may_be(value):
    with pytest.raises(ConfigError) as error:
        load([f"--quantize.linear.float8.keep_float8_shards={value}"], env={})
    assert f"got '{value}'; allowed: 'auto', true or false" in str(error.value)
    with pytest.raises(ConfigError, match=r"got --no-\.\.\.=auto"):
        load(["--no-quantize.linear.float8.keep_float8_shards=auto"], env={})


def test_dashes_and_underscores_are_the_same():
    loaded = load(["--training.local-batch-size", "2", "--training.global_batch_size=-1"], env={})
    assert loaded.config.training.local_batch_size == 2
    assert loaded.config.training.global_batch_size == -1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.converters=a,b"], ["a", "b"]),
        (["--model.converters", "a,b"], ["a", "b"]),
        (["--model.converters", "a", "b"], ["a", "b"]),
        (["--model.converters", "a, b"], ["a", "b"]),
        (["--model.converters", "a,", "b"], ["a", "b"]),
        (["--model.converters", ""], []),
        (["--model.converters="], []),
        (["--model.converters", '["a", "b"]'], ["a", "b"]),
        (["--model.converters+=b"], ["float8", "b"]),
        (["--model.converters+=b", "--model.converters+=c"], ["float8", "b", "c"]),
    ],
)
def test_lists_on_the_command_line(tmp_path, flags, expected):
    loaded = load_toml(tmp_path, '[model]\nconverters = ["float8"]\n', *flags)
    assert loaded.config.model.converters == expected


def test_list_notes_say_replaced_or_added(tmp_path):
    text = '[model]\nconverters = ["a"]\n'
    assert "replaces the list of" in load_toml(tmp_path, text, "--model.converters=b").notes[0]
    assert "added to the 1 of" in load_toml(tmp_path, text, "--model.converters+=b").notes[0]


def test_list_as_string_in_toml(tmp_path):
    loaded = load_toml(tmp_path, '[quantize.linear.float8]\nfilter_fqns = "output, wk"\n')
    assert loaded.config.quantize.linear.float8.filter_fqns == ["output", "wk"]


def test_nested_list_on_the_command_line():
    loaded = load(['--parallelism.module_fqns_per_model_part=[["a"], ["b", "c"]]'], env={})
    assert loaded.config.parallelism.module_fqns_per_model_part == [["a"], ["b", "c"]]


def test_none_can_be_given():
    loaded = load(["--parallelism.context_parallel_load_balancer", "None"], env={})
    assert loaded.config.parallelism.context_parallel_load_balancer is None
    assert load(["--debug.seed=none"], env={}).config.debug.seed is None


@pytest.mark.parametrize("old", [name for name in ALIASES if name not in ("float8", "mx")])
def test_every_alias_reaches_its_key(old, tmp_path):
    from trainer.config.job import JobConfig
    from trainer.config.schema import read_schema

    new = ALIASES[old]
    if new == "job.custom_config_module":
        pytest.skip("imports a module; has its own test")
    default = read_schema(JobConfig).keys[new].default
    value = {bool: not default, int: 3, float: 0.25, str: "elsewhere"}.get(type(default), 3)
    loaded = load([f"--{old}={value}"], env={})
    assert loaded.values[new] == value
    assert any(f"{old} is the older name of {new}" in note for note in loaded.notes)


def test_section_aliases(tmp_path):
    loaded = load_toml(tmp_path, "[float8]\nrecipe_name = 'rowwise'\n", "--float8.emulate")
    assert loaded.config.quantize.linear.float8.recipe_name == "rowwise"
    assert loaded.config.quantize.linear.float8.emulate
    assert load(["--mx.recipe_name=x"], env={}).config.quantize.linear.mx.recipe_name == "x"


def test_old_and_new_name_must_agree(tmp_path):
    found = messages(tmp_path, "[training]\ncompile = true\n[compile]\nenable = false\n")
    assert len(found) == 1
    assert "keep one" in found[0]
    agreed = load_toml(tmp_path, "[training]\ncompile = true\n[compile]\nenable = true\n")
    assert agreed.config.compile.enable
    # A flag over a file is layering, whatever the names.
    assert not load_toml(
        tmp_path, "[training]\ncompile = true\n", "--no-compile.enable"
    ).config.compile.enable


def test_retired_key_only_with_its_default(tmp_path):
    load_toml(tmp_path, "[parallelism]\nenable_compiled_autograd = false\n")
    assert "compiled autograd" in messages(tmp_path, "[parallelism]\nenable_compiled_autograd = true\n")[0]


def test_last_of_a_repeated_flag_holds_with_a_note():
    loaded = load(["--training.steps=3", "--training.steps=4"], env={})
    assert loaded.config.training.steps == 4
    assert "twice" in loaded.notes[0]


@pytest.mark.parametrize("flag", ["--training", "--quantize.linear"])
def test_a_section_is_no_flag(flag):
    with pytest.raises(ConfigError, match="is a section"):
        load([flag, "3"], env={})


def test_overrides_are_typed_and_have_origins(tmp_path):
    loaded = load_toml(tmp_path, "[model.overrides]\nn_layers = 2\n", "--model.overrides.norm_eps=1e-6")
    assert loaded.config.model.overrides == {"n_layers": 2, "norm_eps": 1e-6}
    assert loaded.origins["model.overrides.n_layers"].endswith("run.toml:2")


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        load([], env={}).config.training.steps = 3  # type: ignore[misc]


def test_custom_config_module(tmp_path, monkeypatch):
    (tmp_path / "mine_for_config.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Training:\n    steps: int = 77\n    colour: str = 'red'\n    'Its colour.'\n"
        "@dataclass\nclass Extra:\n    depth: int = 2\n"
        "@dataclass\nclass JobConfig:\n    training: Training = field(default_factory=Training)\n"
        "    extra: Extra = field(default_factory=Extra)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for flag in ("--job.custom_config_module", "--experimental.custom_args_module"):
        loaded = load([f"{flag}=mine_for_config", "--extra.depth=5"], env={})
        assert loaded.config.training.steps == 77
        assert loaded.config.training.colour == "red"
        assert loaded.config.training.seq_len == 2048
        assert loaded.config.extra.depth == 5
        assert loaded.schema.keys["training.colour"].doc == "Its colour."
    with pytest.raises(ConfigError, match="cannot import"):
        load(["--job.custom_config_module=no_such_module_here"], env={})


def test_custom_import_merges_tables_and_refuses_clashes(tmp_path, monkeypatch):
    from models import MODELS

    (tmp_path / "mine_for_tables.py").write_text(
        "from models import MODELS as builtin\nMODELS = {'my_llama': builtin['llama3']}\n"
    )
    (tmp_path / "mine_that_clashes.py").write_text("MODELS = {'llama3': object()}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("trainer.config.extensions.MODELS", MODELS)
    try:
        loaded = load(["--experimental.custom_import=mine_for_tables", "--model.name=my_llama"], env={})
        assert loaded.config.model.name == "my_llama"
        with pytest.raises(ConfigError, match="exist already: llama3"):
            load(["--experimental.custom_import=mine_that_clashes"], env={})
    finally:
        MODELS.pop("my_llama", None)
