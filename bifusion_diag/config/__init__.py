"""Typed settings, presets, and how a run's settings are put together."""

from bifusion_diag.config.presets import (
    ConfigError,
    load_settings,
    parse_value,
    preset_description,
    preset_names,
    settings_from_dict,
)
from bifusion_diag.config.settings import Settings

__all__ = [
    "ConfigError",
    "Settings",
    "load_settings",
    "parse_value",
    "preset_description",
    "preset_names",
    "settings_from_dict",
]
