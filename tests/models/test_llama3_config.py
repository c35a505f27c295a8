from dataclasses import replace

import pytest

from models.llama3.config import FLAVORS, Llama3Config, flop_inputs, problems

# flavor -> dim, layers, heads, KV heads, FFN width, parameters, embedding
PUBLISHED = {
    "debugmodel": (256, 6, 16, 16, 768, 6_163_712, 524_288),
    "1B": (2048, 16, 32, 8, 8192, 1_235_814_400, 262_668_288),
    "3B": (3072, 28, 24, 8, 8192, 3_212_749_824, 394_002_432),
    "8B": (4096, 32, 32, 8, 14336, 8_030_261_248, 525_336_576),
    "70B": (8192, 80, 64, 8, 28672, 70_553_706_496, 1_050_673_152),
    "405B": (16384, 126, 128, 8, 53248, 405_853_388_800, 2_101_346_304),
}
FLOP_PER_TOKEN = {
    ("debugmodel", 2048): 71_585_280,
    ("debugmodel", 8192): 184_831_488,
    ("8B", 2048): 48_250_773_504,
    ("8B", 8192): 57_914_449_920,
    ("70B", 2048): 433_124_327_424,
    ("70B", 8192): 481_442_709_504,
    ("405B", 2048): 2_473_246_556_160,
    ("405B", 8192): 2_625_449_459_712,
}


def test_flavors_are_the_published_ones():
    assert list(FLAVORS) == list(PUBLISHED)


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_sizes(flavor):
    config, sizes = FLAVORS[flavor], flop_inputs(FLAVORS[flavor])
    assert PUBLISHED[flavor] == (
        config.dim,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        config.hidden_dim,
        sizes.parameters,
        sizes.embedding_parameters,
    )
    assert sizes.tied_output == (flavor in ("1B", "3B"))
    assert config.rope_theta == 500_000
    assert config.norm_eps == 1e-5


def test_rope_scaling_of_flavors():
    factors = {flavor: c.rope_scaling_factor if c.rope_scaling else None for flavor, c in FLAVORS.items()}
    assert factors == {"debugmodel": None, "1B": 32, "3B": 32, "8B": 8, "70B": 8, "405B": 8}


@pytest.mark.parametrize(("flavor", "seq_len"), FLOP_PER_TOKEN)
def test_flop_per_token(flavor, seq_len):
    s = flop_inputs(FLAVORS[flavor])
    flop = 6 * (s.parameters - s.embedding_parameters) + 12 * s.n_layers * s.n_heads * s.head_dim * seq_len
    assert flop == FLOP_PER_TOKEN[flavor, seq_len]


def test_explicit_ffn_width_wins():
    assert replace(FLAVORS["8B"], ffn_hidden_dim=1000).hidden_dim == 1000


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"dim": 0}, ["dim"]),
        ({"dim": -1, "vocab_size": 0, "multiple_of": 0}, ["dim", "vocab_size", "multiple_of"]),
        ({"ffn_hidden_dim": 0}, ["ffn_hidden_dim"]),
        ({"norm_eps": float("nan")}, ["norm_eps"]),
        ({"n_heads": 24}, ["n_heads"]),
        ({"n_heads": 4096}, ["n_heads"]),
        ({"n_kv_heads": 5}, ["n_kv_heads"]),
        ({"rope_theta": 1.0}, ["rope_theta"]),
        ({"rope_scaling_factor": 0.5}, ["rope_scaling_factor"]),
        ({"rope_low_freq_factor": 4.0}, ["rope_high_freq_factor"]),
        ({"rope_low_freq_factor": 0.0}, ["rope_low_freq_factor"]),
        ({"rope_original_seq_len": 0}, ["rope_original_seq_len"]),
        ({"rope_scaling": False, "rope_scaling_factor": 0.5}, []),
        ({"attn_mask_type": "document"}, []),
        ({"attn_mask_type": "document", "attn_backend": "flash"}, ["attn_backend"]),
    ],
)
def test_problems(changes, fields):
    found = problems(replace(Llama3Config(), **changes))
    assert [field for field, _ in found] == fields
    assert all(len(message) < 100 for _, message in found)
