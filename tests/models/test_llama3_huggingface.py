import json
from dataclasses import replace

import pytest
import torch

from models.llama3.config import FLAVORS, Llama3Config
from models.llama3.huggingface import config_from_hf, from_hf, hf_config, hf_names, to_hf
from models.llama3.model import Llama3

SMALL = Llama3Config(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=128, multiple_of=32, max_seq_len=96,
    rope_theta=10000.0, rope_original_seq_len=32, rope_scaling_factor=8.0,
)  # fmt: skip


def random_model(config):
    torch.manual_seed(0)
    model = Llama3(config)
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms off 1 and wide projections: what is misplaced shows in the logits.
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape) if "norm" in name else parameter * 4)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [False, True])
def test_logits_equal_transformers(tied, scaling):
    transformers = pytest.importorskip("transformers")
    config = replace(SMALL, tied_output=tied, rope_scaling=scaling)
    model = random_model(config)
    content = json.loads(json.dumps(hf_config(config)))
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content)).eval()
    exported = [to_hf(config, name, tensor) for name, tensor in model.state_dict().items()]
    missing, unexpected = reference.load_state_dict(dict(filter(None, exported)), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    reference.tie_weights()
    tokens = torch.randint(config.vocab_size, (2, 96))
    with torch.no_grad():
        got, expected = model(tokens), reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert config_from_hf(reference.config.to_dict()) == replace(
        config,
        ffn_hidden_dim=config.hidden_dim,
        multiple_of=1024,
        # What is off is not in the file, so it comes back as the default.
        **({} if scaling else {"rope_original_seq_len": 8192}),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_mapping_round_trip(tied):
    config = replace(SMALL, tied_output=tied)
    state = random_model(config).state_dict()
    back = {}
    for name, hf_name in hf_names(config).items():
        exported = to_hf(config, name, state[name])
        assert exported[0] == hf_name
        got_name, tensor = from_hf(config, *exported)
        back[got_name] = tensor
    if tied:
        assert to_hf(config, "output.weight", state["output.weight"]) is None
        assert from_hf(config, "lm_head.weight", state["output.weight"]) is None
        del state["output.weight"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    name = "layers.0.attention.wq.weight"
    assert not torch.equal(to_hf(config, name, state[name])[1], state[name])


def test_permutation_rows():
    config = replace(SMALL, dim=8, n_heads=2, n_kv_heads=1)
    rows = torch.arange(8)[:, None]
    assert to_hf(config, "layers.11.attention.wq.weight", rows)[1][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert from_hf(config, "model.layers.11.self_attn.k_proj.weight", rows[:4])[1][:, 0].tolist() == [
        0,
        2,
        1,
        3,
    ]


def test_unknown_names():
    for name in ("layers.0.attention.wz.weight", "layers.x.attention.wq.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match="unknown tensor"):
            to_hf(SMALL, name, torch.zeros(1))
    with pytest.raises(ValueError, match="unknown tensor"):
        from_hf(SMALL, "model.layers.0.self_attn.q_proj.bias", torch.zeros(1))
    assert from_hf(SMALL, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(1)) is None


@pytest.mark.parametrize("flavor", FLAVORS)
def test_config_round_trip(flavor):
    config = FLAVORS[flavor]
    back = config_from_hf(json.loads(json.dumps(hf_config(config))))
    same = {"ffn_hidden_dim": config.hidden_dim, "multiple_of": 1024, "ffn_dim_multiplier": 1.0}
    assert back == replace(config, **same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 128}, "head_dim is 128"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ],
)
def test_unsupported_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**hf_config(SMALL), **changes})


def test_missing_keys():
    with pytest.raises(ValueError, match="hidden_size, intermediate_size"):
        config_from_hf({"model_type": "llama"})
