"""A run's configuration: a YAML file and ``--section.key value`` overrides, checked and typed."""

# ruff: noqa: F401
from fastppo.algorithms.config import (
    ActorCriticConfig,
    AlgorithmConfig,
    CPIConfig,
    NPGConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
)
from fastppo.config_fields import ConfigError
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.rollout.config import RolloutConfig
from fastppo.training.config.keys import documented_keys
from fastppo.training.config.reading import build_config, load_config, to_dict
from fastppo.training.config.rules import check_consistency
from fastppo.training.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RewardConfig,
    WatchConfig,
    WatchRule,
)
