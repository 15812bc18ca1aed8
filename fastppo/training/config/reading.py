"""Reading a configuration: the YAML file, the overrides, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fastppo.config_fields import ConfigError, did_you_mean
from fastppo.training.config.keys import section_of, type_below
from fastppo.training.config.rules import check_consistency
from fastppo.training.config.schema import Config


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line words, ``["--ppo.kl_coef", "0.1"]`` or ``["--ppo.kl_coef=0.1"]``. Values are YAML, but
            for keys that hold text, which is taken as it is. Items of a list are named by their index
            (``--rewards.0.weight 2``).

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is not valid.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); the configuration file comes first"
            raise ConfigError(f"{path}: {problem}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    words = iter(overrides)
    for word in words:
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{word!r}: expected --section.key value")
        if not equals and (text := next(words, None)) is None:
            raise ConfigError(f"--{key}: needs a value")
        _override(tree, key.replace("-", "_"), text)
    return build_config(tree)


to_dict = dataclasses.asdict  # the tree that `build_config` builds the same Config from


def build_config(tree: dict[str, Any]) -> Config:
    """Check a plain tree of dicts and lists and build the Config from it.

    Raises:
        ConfigError: a key is unknown or a value is not valid.
    """
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    check_consistency(config)
    return config


def _override(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set one key of a tree that is not checked yet."""
    node, hint, parts = tree, Config, dotted.split(".")
    for depth, part in enumerate(parts, 1):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"--{dotted}: {part!r} is not an index of a list of {len(node)}")
            part = int(part)
        elif not isinstance(node, dict):
            above = ".".join(parts[: depth - 1])
            raise ConfigError(f"--{dotted}: {above} is a single value and has no keys below it")
        hint = type_below(hint, part)
        if depth < len(parts):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = [] if typing.get_origin(hint) is list else {}
            node = node[part]
    if hint is not str and (hint != (str | None) or text == "null"):
        with contextlib.suppress(yaml.YAMLError):  # text that is no YAML stays text
            text = yaml.safe_load(text)
    node[part] = text


def _one_line(error: ValidationError) -> str:
    """The first problem as `key: problem`; a misspelt key or choice comes with its nearest neighbour."""
    first = error.errors()[0]
    path, hint, known = [], Config, []
    for part in first["loc"]:
        if section := section_of(hint):
            known = [item.name for item in dataclasses.fields(section)]
        if section or isinstance(part, int):  # else the member of a union that pydantic tried, which is no key
            path, hint = [*path, str(part)], type_below(hint, part)
    key, given, problem = ".".join(path), first.get("input"), first["type"]
    if problem == "unexpected_keyword_argument":
        hint = did_you_mean(path[-1], known, ".".join([*path[:-1], ""]))
        return f"{key}: unknown key{hint or '; known here: ' + ', '.join(known)}"
    if problem == "literal_error":
        choices = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: {given!r} is not one of {', '.join(choices)}{did_you_mean(str(given), choices)}"
    if problem == "missing":
        return f"{key}: required, but not given"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {given!r}"
