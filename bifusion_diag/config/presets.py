"""From a preset's name, a config file and ``key=value`` pairs to checked :class:`Settings`.

Each layer holds only its differences and wins over the one before: defaults, preset (and what it extends), scale,
config file, ``--set``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bifusion_diag.config.settings import Settings
from bifusion_diag.errors import UserError, near_matches

Scale = Literal["full", "small"]

#: How much narrower every part of the model is at scale 'small'.
SMALL_DIVISOR = 4

#: YAML 1.1 reads such a number ("1e-4") as text.
_EXPONENT_WITHOUT_POINT = re.compile(r"[+-]?\d+[eE][+-]?\d+")

_FOLDER = resources.files("bifusion_diag.config") / "presets"


class ConfigError(UserError):
    """A preset, config file or ``key=value`` pair that does not fit the settings."""


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def preset_description(name: str) -> str:
    """One line that says what a preset is."""
    return str(_read_preset(name)["description"])


def load_settings(
    preset: str | None = None,
    *,
    scale: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Settings:
    """Build the settings of a run.

    Args:
        preset: a name of :func:`preset_names`. A config file may name it instead (``preset: ...``); default 'bifusion'.
        scale: 'full' or 'small': the same architecture, every width divided by :data:`SMALL_DIVISOR`. May come from
            the config file too (``scale: ...``).
        config: a YAML file with the same nesting as :class:`Settings`.
        overrides: ``key=value`` pairs with dotted keys; values are YAML.
        values: by dotted key, as ``overrides`` but already parsed; they win over everything else.

    Raises:
        ConfigError: unknown preset or key (near matches are listed), a value out of range, an unreadable file.
    """
    from_file = _read_config(config) if config is not None else {}
    explicit = _merge(from_file, _parse_overrides(overrides), _nested((values or {}).items()))
    name = preset if preset is not None else str(explicit.get("preset", "bifusion"))
    chosen = scale if scale is not None else explicit.get("scale", "full")
    if chosen not in get_args(Scale):
        raise ConfigError(f"unknown scale {chosen!r}.{near_matches(str(chosen), get_args(Scale))}")
    base = _validated(_preset_layers(name), f"preset '{name}'").model_dump()
    if chosen == "small":
        base = _narrowed(base)
    where = " and ".join(filter(None, (str(config) if config else "", "options" if overrides or values else "")))
    _check_keys(explicit, where or "settings")
    return _validated(_merge(base, explicit, {"preset": name, "scale": chosen}), where or f"preset '{name}'")


def settings_from_dict(values: Mapping[str, Any], where: str) -> Settings:
    """Rebuild settings that were stored whole, as in a checkpoint or a run record.

    Raises:
        ConfigError: the values do not fit this version's settings; ``where`` names their origin.
    """
    _check_keys(values, where)
    return _validated(values, where)


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}.{near_matches(name, preset_names())}")
    content: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def _preset_layers(name: str) -> dict[str, Any]:
    content = _read_preset(name)
    below = _preset_layers(content["extends"]) if "extends" in content else {}
    return _merge(below, content.get("settings", {}))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold a mapping of settings, not a {type(content).__name__}")
    return content


def _parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    parsed = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes key=value, for example optim.lr=1e-4; got {pair!r}")
        parsed.append((key.strip(), parse_value(text)))
    return _nested(parsed)


def _nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nest values given by dotted key; a later one wins."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {key}: '{parent}' was given a value before")
        node[leaf] = value
    return result


def parse_value(text: str) -> Any:
    """The value of a ``key=value`` pair: YAML, and numbers like "1e-4".

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}: {error}") from error
    if isinstance(value, str) and _EXPONENT_WITHOUT_POINT.fullmatch(value):
        return float(value)
    return value


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                below = result.get(key)
                result[key] = _merge(below if isinstance(below, Mapping) else {}, value)
            else:
                result[key] = value
    return result


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    """Name a mistyped key and the keys it may have meant, which pydantic's own message does not."""
    known = dict(_dotted_keys(Settings))
    for key, value in _flattened(values, known):
        if key not in known:
            leaf = key.rpartition(".")[2]
            same_leaf = [other for other in known if other.rpartition(".")[2] == leaf]
            hint = f" Did you mean {' or '.join(map(repr, same_leaf))}?" if same_leaf else near_matches(key, known)
            raise ConfigError(f"{where}: unknown key '{key}'.{hint}")
        inner = known[key]
        if inner is not None:
            raise ConfigError(f"{where}: '{key}' holds the settings {', '.join(inner.model_fields)}; got {value!r}")


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel] | None]]:
    """Every key below a settings class, with the settings class it holds (None for a plain value)."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"{prefix}{name}", inner
            yield from _dotted_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", None


def _flattened(values: Mapping[str, Any], known: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and known.get(name) is not None:
            yield from _flattened(value, known, f"{name}.")
        else:
            yield name, value


def _validated(values: Mapping[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(map(_explained, error.errors()))) from error


def _explained(item: ErrorDetails) -> str:
    """One of pydantic's errors. The values of a whole section are not repeated: its message names those that matter."""
    place = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" and isinstance(item["input"], Mapping) else f" (got {item['input']!r})"
    return f"{place}: {message}{got}"


def _narrowed(values: dict[str, Any]) -> dict[str, Any]:
    """Divide every width of the model; layers, kernels, heads' width and losses stay as they are."""
    model = values["model"]
    backbone, clip, decoder = model["backbone"], model["clip"], model["decoder"]
    narrow = {
        "common_width": model["common_width"] // SMALL_DIVISOR,
        "film_hidden": model["film_hidden"] // SMALL_DIVISOR,
        "backbone": {
            "planes": [width // SMALL_DIVISOR for width in backbone["planes"]],
            "init_dim": backbone["init_dim"] // SMALL_DIVISOR,
        },
        "clip": {
            "width": clip["width"] // SMALL_DIVISOR,
            "heads": clip["heads"] // SMALL_DIVISOR,
            "head_hidden": clip["head_hidden"] // SMALL_DIVISOR,
        },
        "gate": {name: model["gate"][name] // SMALL_DIVISOR for name in ("hidden", "heads")},
        "decoder": {
            "width": decoder["width"] // SMALL_DIVISOR,
            "heads": decoder["heads"] // SMALL_DIVISOR,
            "hidden": decoder["hidden"] // SMALL_DIVISOR,
        },
    }
    data = {
        "max_points": values["data"]["max_points"] // 5,
        "image_height": 120,
        "image_width": 160,
        "graph_masks": {"min_size": max(values["data"]["graph_masks"]["min_size"] // 4, 1)},  # a quarter of the pixels
    }
    return _merge(values, {"model": narrow, "data": data, "scale": "small"})
