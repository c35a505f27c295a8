"""JobConfig: every section, composed. Only `trainer` sees the whole; other code takes its section.

Each package owns the dataclass of its section, beside the code that reads it. Adding a key is adding a
field (with a docstring) there; loader, help, checks and docs follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from converters.config import QuantizeConfig
from models.config import ModelConfig
from parallelisms.config import ActivationCheckpointConfig, CommConfig, CompileConfig, ParallelismConfig
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.sections import (
    DebugConfig,
    ExperimentalConfig,
    FaultToleranceConfig,
    JobSection,
    MemoryEstimationConfig,
    TrainingConfig,
    ValidationConfig,
)
from trainer.metrics.config import MetricsConfig, ProfilingConfig
from trainer.optim.config import LRSchedulerConfig, OptimizerConfig
from trainer.resilience.config import ResilienceConfig


@dataclass(frozen=True)
class JobConfig:
    """The whole configuration of a run. Frozen: nothing changes after loading."""

    job: JobSection = field(default_factory=JobSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    experimental: ExperimentalConfig = field(default_factory=ExperimentalConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    memory_estimation: MemoryEstimationConfig = field(default_factory=MemoryEstimationConfig)
