"""Every setting of a run: frozen dataclasses, presets by name, validation, JSON round trip.

A configuration file is a Python file with ``get_config() -> Config``. Values can be overridden by dotted path
(``optimizer.lr=1e-3``); a field that holds a dataclass takes the name of a preset (``model.decoder=vicuna_7b``).
Invalid values raise ConfigError with one line that states what was expected.
"""

from deltallava_jax.config.model import (
    DTYPES,
    REMAT_LADDER,
    DecoderConfig,
    FastVConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
    dtype_name,
)
from deltallava_jax.config.presets import PRESETS, compose, preset
from deltallava_jax.config.run import (
    ASPECTS,
    ROW_AXES,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from deltallava_jax.config.systems import SYSTEMS, ProjectorConfig, register, settings_of, system, system_config
from deltallava_jax.config.tables import STAGES, entry, system_and_stage
from deltallava_jax.config.values import (
    differences,
    drop_foreign,
    from_dict,
    load_config,
    override,
    parse_value,
    read_json,
    renamed,
    to_dict,
    workdir_config,
)
from deltallava_jax.errors import ConfigError  # configurations raise it as config.ConfigError

__all__ = [
    "ASPECTS",
    "DTYPES",
    "PRESETS",
    "REMAT_LADDER",
    "ROW_AXES",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "FastVConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProjectorConfig",
    "RopeScaling",
    "STAGES",
    "SYSTEMS",
    "TrainingConfig",
    "VisionConfig",
    "compose",
    "differences",
    "dtype_name",
    "drop_foreign",
    "entry",
    "from_dict",
    "load_config",
    "override",
    "parse_value",
    "preset",
    "read_json",
    "register",
    "renamed",
    "settings_of",
    "system",
    "system_and_stage",
    "system_config",
    "to_dict",
    "workdir_config",
]
