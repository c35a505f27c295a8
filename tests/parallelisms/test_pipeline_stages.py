"""Which modules a stage holds, and on which rank it is: no torch, no processes."""

import subprocess
import sys

import pytest

from models import MODELS
from parallelisms.config import ParallelismConfig
from parallelisms.pipeline_schedules import StageError, microbatch_problems
from parallelisms.pipeline_stages import outside_blocks, stage_layout

BEFORE, AFTER = outside_blocks(MODELS["llama3"].roles)


def settings(**given):
    return ParallelismConfig(
        **{k if k.startswith("module") else f"pipeline_parallel_{k}": v for k, v in given.items()}
    )


def layout(n_layers, **given):
    return stage_layout(settings(**given), n_layers, blocks="layers", before=BEFORE, after=AFTER)


@pytest.mark.parametrize(
    ("n_layers", "given", "expected", "ranks"),
    [
        (6, {"degree": 1}, "tok_embeddings, layers.0-5, norm, output", (0,)),
        (6, {"degree": 2}, "tok_embeddings, layers.0-2 | layers.3-5, norm, output", (0, 1)),
        (7, {"degree": 2}, "tok_embeddings, layers.0-3 | layers.4-6, norm, output", (0, 1)),
        (
            6,
            {"degree": 2, "first_stage_less_layers": 0, "last_stage_less_layers": 2},
            "tok_embeddings, layers.0-3 | layers.4-5, norm, output",
            (0, 1),
        ),
        (
            6,
            {"degree": 2, "schedule": "Interleaved1F1B"},
            "tok_embeddings, layers.0 | layers.1-2 | layers.3-4 | layers.5, norm, output",
            (0, 1, 0, 1),
        ),
        (
            6,
            {"degree": 2, "schedule": "ZBVZeroBubble"},
            "tok_embeddings, layers.0 | layers.1-2 | layers.3-4 | layers.5, norm, output",
            (0, 1, 1, 0),
        ),
        (
            4,
            {"degree": 2, "schedule": "LoopedBFS", "layers_per_stage": 1},
            "tok_embeddings | layers.0 | layers.1 | layers.2 | layers.3 | norm, output",
            (0, 1, 0, 1, 0, 1),
        ),
        (
            2,
            {
                "degree": 2,
                "module_fqns_per_model_part": [
                    ["tok_embeddings", "layers.0"],
                    ["output", "layers.1", "norm"],
                ],
            },
            "tok_embeddings, layers.0 | layers.1, norm, output",
            (0, 1),
        ),
    ],
)
def test_layouts(n_layers, given, expected, ranks):
    made = layout(n_layers, **given)
    assert (made.describe(), made.ranks) == (expected, ranks)
    assert [name for names in made.fqns for name in names] == [
        *BEFORE,
        *(f"layers.{i}" for i in range(n_layers)),
        *AFTER,
    ]


def test_405b_over_16_ranks_by_8_stages():
    made = layout(126, degree=16, schedule="Interleaved1F1B", layers_per_stage=1)
    assert made.count == 128
    assert made.fqns[0] == ("tok_embeddings",)
    assert made.fqns[127] == ("norm", "output")
    assert made.of_rank(3) == [3 + 16 * i for i in range(8)]


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"layers_per_stage": 2}, "layers_per_stage", "4 stages; 1F1B over 2 ranks takes 2"),
        ({"layers_per_stage": 3}, "layers_per_stage", "3 stages; 1F1B over 2 ranks takes 2"),
        ({"layers_per_stage": 4, "schedule": "LoopedBFS"}, "layers_per_stage", "a multiple of 2 from 4 on"),
        ({"layers_per_stage": 1, "schedule": "ZBVZeroBubble"}, "layers_per_stage", "takes 4"),
        ({"first_stage_less_layers": 9}, "first_stage_less_layers", "9 is more than a stage has"),
        (
            {"module_fqns_per_model_part": [["tok_embeddings"], ["layers.9"]]},
            "module_fqns_per_model_part",
            "'layers.9' is no module",
        ),
        (
            {"module_fqns_per_model_part": [["tok_embeddings"], ["norm"]]},
            "module_fqns_per_model_part",
            "leaves out layers.0",
        ),
        (
            {"module_fqns_per_model_part": [[*BEFORE, *AFTER], [f"layers.{i}" for i in range(6)]]},
            "module_fqns_per_model_part",
            "layers.0 comes after output",
        ),
        (
            {
                "module_fqns_per_model_part": [
                    [*BEFORE, *BEFORE],
                    [*(f"layers.{i}" for i in range(6)), *AFTER],
                ]
            },
            "module_fqns_per_model_part",
            "tok_embeddings more than once",
        ),
        ({"schedule": "PipelineScheduleMulti"}, "schedule_csv", "got none"),
        ({"schedule": "PipelineScheduleMulti", "schedule_csv": "/no/such"}, "schedule_csv", "No such file"),
    ],
)
def test_refusals(given, key, message):
    with pytest.raises(StageError, match=message) as caught:
        layout(6, degree=2, **given)
    assert caught.value.key.endswith(key)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n", "1 lines for 2 ranks"),
        ("0F0,0B0\n1F0,1X0\n", "got '1X0'"),
        ("0F0,0B0\n0F1,0B1\n", "gives one to two ranks"),
        ("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", "needs 0F1 and 0B1"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "waits for what never comes"),
    ],
)
def test_schedule_files_that_cannot_run(tmp_path, text, message):
    path = tmp_path / "order.csv"
    path.write_text(text)
    with pytest.raises(StageError, match=message):
        layout(6, degree=2, schedule="PipelineScheduleMulti", schedule_csv=str(path))


@pytest.mark.parametrize(
    ("given", "stages", "batch", "message"),
    [
        ({"schedule": "1F1B", "degree": 4}, 4, 4, None),
        ({"schedule": "1F1B", "degree": 4}, 4, 3, "1F1B needs at least 4"),
        ({"schedule": "1F1B", "degree": 2, "microbatch_size": 3}, 2, 8, "3 does not divide"),
        ({"schedule": "DualPipeV", "degree": 2}, 4, 3, "DualPipeV needs at least 4"),
        ({"schedule": "Interleaved1F1B", "degree": 4}, 8, 10, None),
        ({"schedule": "Interleaved1F1B", "degree": 4}, 8, 9, "rounds of 4"),
        ({"schedule": "GPipe", "degree": 4}, 4, 1, None),
    ],
)
def test_microbatches(given, stages, batch, message):
    found = list(microbatch_problems(settings(**given), stages, batch))
    assert [message in text for text in found] == ([] if message is None else [True]), found


def test_stages_are_known_without_torch():
    code = "import sys, parallelisms.pipeline_stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
