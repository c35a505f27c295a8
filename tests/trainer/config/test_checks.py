"""Cross-field checks, all before torch is imported."""

import pytest

from trainer.config import checks, derived
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.preflight import preflight


def found(*flags, world_size=1):
    return [str(problem) for problem in checks.problems(load(list(flags), env={}), world_size)]


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        (["--model.name=lama3"], 1, "did you mean 'llama3'"),
        (["--model.flavor=8b"], 1, "did you mean '8B'"),
        (["--model.converters=flot8"], 1, "did you mean 'float8'"),
        (["--model.converters=float8,quantize.linear.float8"], 1, "more than once"),
        (["--training.dataset=python_source"], 1, "did you mean 'python_sources'"),
        (["--parallelism.tensor_parallel_degree=3"], 3, "3 does not divide n_heads = 16"),
        (["--parallelism.tensor_parallel_degree=2", "--training.seq_len=33"], 2, "33 is not divisible by 2"),
        (["--parallelism.context_parallel_degree=2", "--training.seq_len=6"], 2, "6 is not divisible by 4"),
        (
            ["--parallelism.context_parallel_degree=2", "--model.overrides.attn_backend=efficient"],
            2,
            "no log-sum-exp",
        ),
        (
            [
                "--parallelism.context_parallel_degree=2",
                "--parallelism.context_parallel_rotate_method=alltoall",
                "--model.overrides.attn_mask_type=document",
            ],
            2,
            "keys and values are gathered; allowed: 'allgather'",
        ),
        (["--parallelism.pipeline_parallel_degree=8"], 8, "8 stages for 6 layers"),
        (["--parallelism.data_parallel_shard_degree=3"], 4, "does not fit 4 processes"),
        (["--training.global_batch_size=12"], 1, "12 is not a multiple of 8"),
        (["--training.global_batch_size=8"], 2, "8 is not a multiple of 16"),
        (["--activation_checkpoint.mode=memory_budget"], 1, "needs compile.enable"),
        (["--checkpoint.keep_latest_k=1"], 1, "got 1"),
        (["--checkpoint.last_save_in_hf"], 1, "needs checkpoint.last_save_model_only"),
        (["--model.overrides.n_heads=7"], 1, "model.overrides.n_heads"),
        (
            ["--optimizer.implementation=one_pass", "--training.enable_cpu_offload"],
            1,
            "offloaded parameters are stepped on the host",
        ),
        (
            [
                "--float8.enable_fsdp_float8_all_gather",
                "--float8.keep_float8_shards",
                "--training.enable_cpu_offload",
            ],
            1,
            "keep_float8_shards: has no effect with training.enable_cpu_offload",
        ),
        (
            ["--parallelism.tensor_parallel_degree=2", "--model.overrides.norm_kernel=fused"],
            2,
            "'fused' norms a whole stream",
        ),
    ],
)
def test_refusals(flags, world_size, expected):
    messages = found(*flags, world_size=world_size)
    assert any(expected in message for message in messages), messages
    assert all(message.count("\n") < 3 for message in messages)


PP = "--parallelism.pipeline_parallel_"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.overrides.tied_output"], "tied to its embedding"),
        ([f"{PP}schedule=PipelineScheduleSingle"], "is a base class"),
        ([f"{PP}schedule_csv=order.csv"], "read by PipelineScheduleMulti alone"),
        ([f"{PP}microbatch_size=3"], "3 does not divide training.local_batch_size = 8"),
        ([f"{PP}microbatch_size=8"], "1F1B needs at least 2 micro-batches"),
        ([f"{PP}layers_per_stage=2"], "1F1B over 2 ranks takes 2"),
        ([f"{PP}schedule=ZBVZeroBubble", "--compile.enable"], "a compiled block both at once"),
        (
            [f"{PP}schedule=ZBVZeroBubble", "--parallelism.fsdp_reshard_after_forward=always"],
            "'always' frees weights",
        ),
        (
            [f"{PP}schedule=ZBVZeroBubble", "--model.overrides.norm_kernel=fused"],
            "apart, 'fused' both at once",
        ),
        (
            [
                f"{PP}schedule=InterleavedZeroBubble",
                "--activation_checkpoint.mode=selective",
                "--activation_checkpoint.selective_ac_option=op",
            ],
            "per-op checkpointing serves one backward",
        ),
    ],
)
def test_refused_pipelines(flags, expected):
    messages = found(f"{PP}degree=2", *flags, world_size=2)
    assert len(messages) == 1, messages
    assert expected in messages[0]
    assert messages[0].count("\n") < 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--training.loss_chunk_tokens=1024"], ["cuts nothing: a micro-batch of a rank has 1024 tokens"]),
        (["--training.loss_chunk_tokens=1023"], []),
        (
            ["--training.loss_chunk_tokens=512", "--parallelism.context_parallel_degree=2"],
            ["a rank has 512 tokens"],
        ),
        (["--training.loss_kernel=fused", "--compile.enable"], []),
        (
            ["--training.loss_kernel=fused", "--compile.enable", "--compile.components=loss"],
            ["never compiled"],
        ),
    ],
)
def test_settings_of_the_loss_without_effect(flags, expected):
    flags = [*flags, "--training.seq_len=128", "--training.local_batch_size=8"]
    messages = [line for line in checks.warnings(load(flags, env={})) if "loss" in line]
    assert len(messages) == len(expected), messages
    assert all(part in message for part, message in zip(expected, messages, strict=True))


def test_pipelines_that_are_sound():
    assert found(f"{PP}degree=2", world_size=4) == []
    assert checks.unavailable(load([f"{PP}degree=2"], env={})) == []
    zero_bubble = [f"{PP}degree=2", f"{PP}schedule=ZBVZeroBubble"]
    assert found(*zero_bubble, "--compile.enable", "--compile.components=loss", world_size=2) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        ([f"{PP}schedule=GPipe", "--training.local_batch_size=1"], "1 micro-batches for 2 pipeline ranks"),
        ([f"{PP}expert_parallel_overlap=false"], "has no effect: the model has no experts"),
        (
            [f"{PP}schedule=ZBVZeroBubble", "--activation_checkpoint.mode=full"],
            "computes a checkpointed block again",
        ),
        (
            [
                f"{PP}schedule=ZBVZeroBubble",
                "--model.converters=float8",
                "--activation_checkpoint.mode=none",
            ],
            "backward twice",
        ),
    ],
)
def test_pipelines_that_are_warned_about(flags, expected):
    lines = checks.warnings(load([f"{PP}degree=2", *flags], env={}))
    assert [expected in line for line in lines] == ([] if expected is None else [True]), lines


@pytest.mark.parametrize(
    ("balancer", "tp", "length", "fits"),
    [("headtail", 1, 6, False), ("none", 1, 6, True), ("headtail", 2, 8, True), ("headtail", 3, 12, True),
     ("none", 3, 12, True), ("none", 3, 14, False)],
)  # fmt: skip
def test_positions_of_a_rank_are_two_equal_chunks_and_split_over_tp(balancer, tp, length, fits):
    """Context parallelism over 2, with heads and vocabulary that every tp divides."""
    messages = found(
        "--parallelism.context_parallel_degree=2",
        f"--parallelism.context_parallel_load_balancer={balancer}",
        f"--parallelism.tensor_parallel_degree={tp}",
        f"--training.seq_len={length}",
        "--model.overrides.n_heads=12",
        "--model.overrides.n_kv_heads=12",
        "--model.overrides.dim=96",
        "--model.overrides.vocab_size=1200",
        world_size=2 * tp,
    )
    assert (messages == []) == fits, messages


def test_default_is_sound():
    assert found() == []
    assert checks.warnings(load([], env={})) == []


def test_batch_arithmetic():
    config = load(
        ["--training.local_batch_size=2", "--training.global_batch_size=16", "--training.seq_len=64"], env={}
    ).config
    batch = derived.batch_arithmetic(config, world_size=4)
    assert (batch.dp_degree, batch.gradient_accumulation_steps) == (4, 2)
    assert (batch.global_batch_size, batch.tokens_per_step) == (16, 1024)


def test_model_config_takes_overrides_and_the_longest_sequence():
    config = load(
        [
            "--model.overrides.n_layers=2",
            "--training.seq_len=64",
            "--validation.enable",
            "--validation.seq_len=128",
        ],
        env={},
    ).config
    model = derived.model_config(config)
    assert (model.n_layers, model.max_seq_len) == (2, 128)


def test_settings_without_effect_are_warned_about():
    lines = checks.warnings(load(["--float8.recipe_name=rowwise", "--compile.components=model"], env={}))
    assert any("quantize.linear.float8" in line for line in lines)
    assert any("compile.components has no effect" in line for line in lines)
    idle = checks.warnings(load(["--parallelism.pipeline_parallel_schedule=GPipe"], env={}))
    assert idle == ["parallelism.pipeline_parallel_schedule has no effect: pipeline_parallel_degree is 1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--parallelism.context_parallel_degree=2", "--parallelism.context_parallel_load_balancer=ptrr"],
        ["--fault_tolerance.enable"],
        ["--memory_estimation.enabled"],
        ["--mx.recipe_name=other"],
        ["--quantize.grouped_mm.float8.fqns=experts"],
        ["--parallelism.expert_tensor_parallel_degree=2"],
        ["--comm.mode=local_tensor"],
    ],
)
def test_what_does_not_exist_is_refused_for_a_run(flags):
    assert "not available" in str(checks.unavailable(load(flags, env={}))[0])
    with pytest.raises(ConfigError, match="not available"):
        preflight(flags, world_size=2)


def test_preflight_reports_missing_inputs(tmp_path):
    with pytest.raises(ConfigError) as caught:
        preflight(
            ["--training.dataset_path=/no/such/place", f"--model.hf_assets_path={tmp_path}"], world_size=1
        )
    text = str(caught.value)
    assert "training.dataset_path" in text
    assert "model.hf_assets_path" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compile.enable", "--model.overrides.swiglu_kernel=fused"], 1),
        (["--compile.enable"], 0),
        (["--model.overrides.swiglu_kernel=fused"], 0),  # the converter warns of least without compile
    ],
)
def test_least_with_a_product_that_is_not_made_again_is_warned_about(flags, said):
    flags = [*flags, "--model.converters=float8", "--quantize.linear.float8.saved_input=least"]
    found = [text for text in checks.warnings(load(flags, env={})) if "least" in text]
    assert len(found) == said
