"""Every option once; their checks; presets; DeepSpeed's files; the same as flags, YAML and commands."""

from sftlab.config.configs import DataConfig, EvaluateConfig, ExportConfig, LaunchConfig, MemoryConfig, TrainConfig
from sftlab.errors import UserError

__all__ = ["DataConfig", "EvaluateConfig", "ExportConfig", "LaunchConfig", "MemoryConfig", "TrainConfig", "UserError"]
