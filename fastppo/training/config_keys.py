"""The pages of `fastppo keys`."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from fastppo.algorithms.config import AlgorithmConfig
from fastppo.errors import ConfigError, did_you_mean
from fastppo.training.config import ALGORITHMS, Config, section_of, type_below


class Key(typing.NamedTuple):
    """One key. In its dotted name, `N` stands for the index of an item; the default is YAML."""

    name: str
    type: str
    default: str
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.default} ({self.type})"


def documented_keys(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every key of a section and of the sections in it."""
    for item in dataclasses.fields(section):
        name, hint = prefix + item.name, type_below(section, item.name)
        if below := section_of(hint):
            yield from documented_keys(below, f"{name}.N." if typing.get_origin(hint) is list else f"{name}.")
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        default = (
            "required" if default in (dataclasses.MISSING, "") else yaml.safe_dump(default, default_flow_style=True)
        )
        # pydantic does not hand the help text down to a class that only changes the default.
        fields = (vars(base).get("__pydantic_fields__", {}).get(item.name) for base in section.__mro__)
        text = next((field.description for field in fields if field and field.description), "")
        yield Key(name, _type_name(hint), default.split("\n")[0], " ".join(text.split()))


def explain(name: str) -> str:
    """The keys of a section such as `ppo`, or one key, with their whole help texts.

    Raises:
        ConfigError: there is no such section or key.
    """
    keys = list(documented_keys())
    found = [key for key in keys if f"{key.name}.".startswith(f"{name}.")]
    if not found:
        known = dict.fromkeys(word for key in keys for word in (key.name.split(".")[0], key.name))
        hint = did_you_mean(name, known) or "; `fastppo keys` lists them"
        raise ConfigError(f"{name}: no such section or key{hint}")
    wrapper = textwrap.TextWrapper(112, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(line for key in found for line in (str(key), *wrapper.wrap(key.help)))


def overview() -> str:
    """One line for every key. The keys that all algorithms share stand once, and again where a default differs."""
    shared = {key.name.partition(".")[2]: key for key in documented_keys(AlgorithmConfig, "ALGORITHM.")}
    sections: dict[str, list[Key]] = {}
    for key in documented_keys():
        section, _, name = key.name.rpartition(".")
        if section in ALGORITHMS:
            sections.setdefault("ALGORITHM", list(shared.values()))
        if section not in ALGORITHMS or name not in shared or shared[name].default != key.default:
            sections.setdefault(section, []).append(key)
    lines = [f"ALGORITHM is any of {', '.join(ALGORITHMS)}. `fastppo keys ppo` explains the keys of a section."]
    for keys in sections.values():
        lines += ["", *(textwrap.shorten(f"{key} {key.help}", 120, placeholder="...") for key in keys)]
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    members = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, members))
    if members and typing.get_origin(hint) is not list:
        return "|".join("null" if member is type(None) else _type_name(member) for member in members)
    return getattr(hint, "__name__", str(hint))
