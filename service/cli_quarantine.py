"""`learnd quarantine`: what the guard of a line held or refused, and your word on it."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlencode

import typer

from service.options import ApiKey, AsJson, Config, LineName, Url, client, print_json

quarantine_commands = typer.Typer(help="Feedback that is not learned from, and why.", no_args_is_help=True)

Ids = Annotated[list[str], typer.Argument(metavar="FEEDBACK_ID…", help="As `learnd quarantine list` shows them.")]


@quarantine_commands.command("list")
def cases(
    line: LineName,
    reason: Annotated[str | None, typer.Option(help="Only this reason, such as contradicted.")] = None,
    is_all: Annotated[bool, typer.Option("--all", help="Also what was refused for good, released and dropped.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """List what waits for a decision, newest first."""
    asked = {"which": "all" if is_all else "held"} | ({} if reason is None else {"reason": reason})
    with client(url, key, config) as daemon:
        said = daemon.get(f"/api/quarantine/{line}?{urlencode(asked)}")
    if as_json:
        print_json(said)
        return
    from service import screens

    screens.show(screens.cases(said["data"]))


@quarantine_commands.command()
def release(ids: Ids, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Learn from it all the same; no cap holds it again."""
    _decide("release", ids, url, key, config)


@quarantine_commands.command()
def drop(ids: Ids, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Never learn from it."""
    _decide("drop", ids, url, key, config)


def _decide(decision: Literal["release", "drop"], ids: list[str], url: Url, key: ApiKey, config: Config) -> None:
    with client(url, key, config) as daemon:
        print_json(daemon.post(f"/api/quarantine/{decision}", {"ids": ids}))
