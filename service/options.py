"""What the commands share: their options, the settings they go by, the connection to a daemon. Imports stay inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from service.client import Client
    from service.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="LEARND_CONFIG", help="The settings' file; learnd.toml here if there is one."),
]
Url = Annotated[str | None, typer.Option(envvar="LEARND_URL", help="The daemon; by default as the settings say.")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="LEARND_KEY", help="An API key, where keys are needed.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
LineName = Annotated[str, typer.Argument(metavar="LINE")]
Version = Annotated[str | None, typer.Argument(metavar="[VERSION]", help="Such as v7; by default the obvious one.")]


def settings(config: Path | None, flags: dict[str, Any]) -> Settings:
    """The settings that a command goes by."""
    from service.settings_file import load

    here = Path("learnd.toml")
    return load(config or (here if here.exists() else None), flags)


def client(url: str | None, key: str | None, config: Path | None) -> Client:
    """A connection to the daemon that `url`, or else the settings, name."""
    from service.client import Client

    if url is None:
        http = settings(config, {}).http
        host = "127.0.0.1" if http.host in {"0.0.0.0", "::"} else http.host  # noqa: S104 - compared, not bound
        url = f"http://{f'[{host}]' if ':' in host else host}:{http.port}"
    return Client(url, key or os.environ.get("LEARND_KEY"))


def print_json(value: dict[str, Any]) -> None:
    """Print an object for programs and people."""
    import json

    typer.echo(json.dumps(value, indent=2))
