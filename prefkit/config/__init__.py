"""The YAML of a run: read strictly, checked before torch is imported."""

from .errors import ConfigError
from .load import LoadedConfig, load_config, load_use_config
from .schema import (
    DataConfig,
    GenerationConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    ReferenceConfig,
    RunConfig,
    TuningConfig,
    UseConfig,
)
from .source import dump_yaml

__all__ = [
    "ConfigError",
    "DataConfig",
    "GenerationConfig",
    "LoadedConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "ReferenceConfig",
    "RunConfig",
    "TuningConfig",
    "UseConfig",
    "dump_yaml",
    "load_config",
    "load_use_config",
]
