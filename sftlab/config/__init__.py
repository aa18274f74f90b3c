"""Every option once; their checks; presets; DeepSpeed's files; the same as flags, YAML and commands."""

from sftlab.config.configs import (
    AccessConfig,
    BenchmarkConfig,
    ChatConfig,
    DataConfig,
    DoctorConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    LaunchConfig,
    MemoryConfig,
    MetricsConfig,
    ModelsConfig,
    ReportConfig,
    RunsConfig,
    SweepConfig,
    TokenConfig,
    TrainConfig,
)
from sftlab.errors import UserError

__all__ = [
    "AccessConfig",
    "BenchmarkConfig",
    "ChatConfig",
    "DataConfig",
    "DoctorConfig",
    "DownloadConfig",
    "EvaluateConfig",
    "ExportConfig",
    "LaunchConfig",
    "MemoryConfig",
    "MetricsConfig",
    "ModelsConfig",
    "ReportConfig",
    "RunsConfig",
    "SweepConfig",
    "TokenConfig",
    "TrainConfig",
    "UserError",
]
