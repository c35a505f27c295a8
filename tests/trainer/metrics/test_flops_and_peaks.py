import pytest

from models.spec import FlopInputs
from trainer.metrics.devices import peak_tflops
from trainer.metrics.flops import flops_per_token, mfu_percent, tflops_per_device

DEBUG = FlopInputs(6_163_712, 524_288, False, 6, 16, 16)
LLAMA_1B = FlopInputs(1_235_814_400, 262_668_288, True, 16, 32, 64)
LLAMA_8B = FlopInputs(8_030_261_248, 525_336_576, False, 32, 32, 128)
LLAMA_70B = FlopInputs(70_553_706_496, 1_050_673_152, False, 80, 64, 128)
LLAMA_405B = FlopInputs(405_853_388_800, 2_101_346_304, False, 126, 128, 128)


@pytest.mark.parametrize(
    ("inputs", "seq_len", "expected"),
    [
        (DEBUG, 2048, 71_585_280),
        (DEBUG, 8192, 184_831_488),
        (LLAMA_8B, 2048, 48_250_773_504),
        (LLAMA_8B, 8192, 57_914_449_920),
        (LLAMA_70B, 2048, 433_124_327_424),
        (LLAMA_70B, 8192, 481_442_709_504),
        (LLAMA_405B, 2048, 2_473_246_556_160),
        (LLAMA_405B, 8192, 2_625_449_459_712),
    ],
)
def test_flops_per_token_of_the_known_flavors(inputs, seq_len, expected):
    assert flops_per_token(inputs, seq_len) == expected


def test_a_tied_output_counts_its_matmul():
    # 6 * 1,235,814,400 + 12 * 16 * 32 * 64 * 2048
    assert flops_per_token(LLAMA_1B, 2048) == 7_414_886_400 + 805_306_368
    # An untied copy of the same model has the head's weight in P besides the embedding's.
    head = LLAMA_1B.embedding_parameters
    untied = FlopInputs(LLAMA_1B.parameters + head, head, False, 16, 32, 64)
    assert flops_per_token(untied, 2048) == flops_per_token(LLAMA_1B, 2048)


@pytest.mark.parametrize(
    ("tps", "tflops", "mfu"),
    [(7034, "407.37", "41.19"), (6344, "367.41", "37.15"), (7663, "443.80", "44.87")],
)
def test_mfu_of_the_published_8b_runs(tps, tflops, mfu):
    rate = tflops_per_device(tps, flops_per_token(LLAMA_8B, 8192))
    assert f"{rate:.2f}" == tflops
    assert f"{mfu_percent(rate, 989):.2f}" == mfu
    assert mfu_percent(rate, None) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 SXM5 80GB", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.85),
        ("AMD Instinct MI300X", 1300),
        ("AMD Instinct MI300X OAM", 1300),
        ("AMD Instinct MI325X", 1300),
        ("AMD Instinct MI355X", 2500),
    ],
)
def test_known_devices(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA H100",  # which of the three it is, the name does not say
        "NVIDIA H800",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB300",
        "NVIDIA B300 SXM6 AC",
        "NVIDIA B100",
        "NVIDIA A10",
        "NVIDIA A10G",
        "NVIDIA A100X",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA L4",
        "NVIDIA L40",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 4090",
        "Tesla V100-SXM2-32GB",
        "AMD Instinct MI300A",
        "AMD Instinct MI350X",
        "AMD Instinct MI250X",
        # Slices of a device.
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "GRID A100D-80C",
        "NVIDIA A100-40C",
    ],
)
def test_a_device_that_is_not_in_the_table_has_no_peak(name):
    assert peak_tflops(name) is None
