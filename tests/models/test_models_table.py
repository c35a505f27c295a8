import dataclasses
import fnmatch
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from models import MODELS, flavor_names
from models.spec import FlopInputs, ModelSpec

DOC = Path(__file__).parents[2] / "docs" / "adding_a_model.md"


def example_spec() -> ModelSpec:
    """The example of docs/adding_a_model.md, run as it stands there."""
    code = DOC.read_text().split("```python\n")[1].split("```")[0]
    namespace: dict = {"__name__": "example_model"}
    module = type(sys)("example_model")
    sys.modules["example_model"] = module  # dataclasses look their module up
    exec(compile(code, str(DOC), "exec"), namespace)
    return namespace["SPEC"]


def specs():
    return [*MODELS.items(), ("example", example_spec())]


def test_tables_do_not_import_torch():
    code = (
        "import sys, models, models.llama3.config, models.llama3.huggingface; "
        "[(s.problems(c), s.flop_inputs(c)) for s in models.MODELS.values() for c in s.flavors.values()]; "
        "print('torch' in sys.modules)"
    )
    root = DOC.parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_flavor_names():
    assert flavor_names() == [f"llama3/{f}" for f in ("debugmodel", "1B", "3B", "8B", "70B", "405B")]


@pytest.mark.parametrize(("name", "spec"), specs())
def test_every_role_and_the_block_list_match_the_model(name, spec):
    with torch.device("meta"):
        model = spec.build(spec.flavors["debugmodel"])
    leaves = {fqn for fqn, module in model.named_modules() if list(module.parameters(recurse=False))}
    covered = set()
    for pattern in spec.roles:
        matched = {
            fqn
            for fqn in leaves
            if fnmatch.fnmatchcase(fqn, pattern) and fqn.count(".") == pattern.count(".")
        }
        assert matched, f"{pattern} matches nothing"
        covered |= matched
    assert covered == leaves
    blocks = model.get_submodule(spec.blocks)
    assert len(blocks) == spec.flavors["debugmodel"].n_layers


@pytest.mark.parametrize(("name", "spec"), specs())
def test_flop_inputs_count_the_parameters_of_every_flavor(name, spec):
    for config in spec.flavors.values():
        assert spec.problems(config) == []
        with torch.device("meta"):
            model = spec.build(config)
        sizes = spec.flop_inputs(config)
        assert isinstance(sizes, FlopInputs)
        assert sum(p.numel() for p in model.parameters()) == sizes.parameters
        assert model.tok_embeddings.weight.numel() == sizes.embedding_parameters


@pytest.mark.parametrize(("name", "spec"), specs())
def test_every_config_field_is_typed_and_documented(name, spec):
    source = (
        Path(sys.modules[spec.config_type.__module__].__file__ or DOC).read_text()
        if name != "example"
        else ""
    )
    hints = typing.get_type_hints(spec.config_type) if name != "example" else {}
    for field in dataclasses.fields(spec.config_type):
        if name != "example":
            assert field.name in hints
            after = source.split(f"    {field.name}: ", 1)[1].split("\n")[1]
            assert after.strip().startswith('"""'), f"{field.name} has no docstring"


def test_example_runs():
    spec = example_spec()
    model = spec.build(spec.flavors["debugmodel"])
    model.init_weights()
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 256)
