"""The options of a run: meaning, allowed values, and reading them from files."""

from estune.config.options import (
    ELSEWHERE,
    EVALUATE_FIELDS,
    FIELD_TYPES,
    FIELDS,
    METHODS,
    OF_METHODS,
    PROBE_FIELDS,
    RESUMABLE,
    SAMPLING_METHODS,
    SCORE_FIELDS,
    ESConfig,
    ResolvedConfig,
    SizedConfig,
    canonical,
    canonical_name,
    coerce,
    default_of,
)
from estune.config.yaml_file import read_config_file

__all__ = [
    "ELSEWHERE",
    "EVALUATE_FIELDS",
    "FIELDS",
    "FIELD_TYPES",
    "METHODS",
    "OF_METHODS",
    "PROBE_FIELDS",
    "RESUMABLE",
    "SAMPLING_METHODS",
    "SCORE_FIELDS",
    "ESConfig",
    "ResolvedConfig",
    "SizedConfig",
    "canonical",
    "canonical_name",
    "coerce",
    "default_of",
    "read_config_file",
]
