"""The YAML of a run: read strictly, checked before torch is imported."""

from .errors import ConfigError
from .load import LoadedConfig, load_config
from .schema import AdapterConfig, DataConfig, MethodConfig, ModelConfig, OutputConfig, RunConfig
from .source import dump_yaml

__all__ = [
    "AdapterConfig",
    "ConfigError",
    "DataConfig",
    "LoadedConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "RunConfig",
    "dump_yaml",
    "load_config",
]
