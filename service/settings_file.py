"""Settings from where users write them: `learnd.toml`, then `LEARND_*`, then flags, the later winning.

A key that does not exist is an error that names the nearest one, at every level.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from service.errors import SettingsError
from service.settings import Settings

OTHER_VARIABLES = frozenset({"LEARND_CACHE", "LEARND_CPU_LORA", "LEARND_CONFIG", "LEARND_URL", "LEARND_KEY"})
"""Variables with our prefix that are no settings of the daemon."""


def load(path: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """The settings from the file (if any), the environment and the flags.

    Raises `SettingsError` with the key, what is wrong with it, and the nearest key when it is misspelt.
    """
    tree = _merge(_merge(_read(path) if path else {}, _environment()), flags or {})
    try:
        return Settings(**tree)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(dict(one)) for one in error.errors())) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"no settings file at {path}: check --config") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None


def _environment() -> dict[str, Any]:
    for name in os.environ:
        if name.startswith("LEARND_") and name not in OTHER_VARIABLES:
            first = name.removeprefix("LEARND_").split("__")[0].lower()
            if first not in Settings.model_fields:
                raise SettingsError(f"unknown environment variable {name}{_nearest(first, list(Settings.model_fields))}")
    return EnvSettingsSource(Settings)()


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _explain(error: dict[str, Any]) -> str:
    where = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(where) or 'settings'}: {error['msg'].removeprefix('Value error, ')}"
    return f"unknown setting {'.'.join(where)!r}{_nearest(where[-1], _keys_at(where[:-1]), where[:-1])}"


def _nearest(key: str, known: list[str], where: list[str] | None = None) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {'.'.join([*(where or []), near[0]])!r}?" if near else ""


def _keys_at(where: list[str]) -> list[str]:
    """The keys that the table at `where` may have: fields by name, entries of a dictionary by any name."""
    model: Any = Settings
    for part in where:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:
            model = get_args(model)[-1]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
