"""The `learnd` command: each verb reads its arguments, does one thing through one door, and prints what came of it.

Imports stay inside the commands, so that `learnd --help` answers at once. Commands about a running daemon talk HTTP to it,
like any client. Errors of ours become one line on stderr and status 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from service.client import Client
    from service.settings import Settings

app = typer.Typer(
    help="A daemon that serves a language model and learns from the feedback on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
feedback_commands = typer.Typer(help="Feedback from files.", no_args_is_help=True)
base_commands = typer.Typer(help="Base models.", no_args_is_help=True)
key_commands = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(feedback_commands, name="feedback")
app.add_typer(base_commands, name="base")
app.add_typer(key_commands, name="key")

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="LEARND_CONFIG", help="The settings' file; learnd.toml here if there is one."),
]
Url = Annotated[str | None, typer.Option(envvar="LEARND_URL", help="The daemon; by default as the settings say.")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="LEARND_KEY", help="An API key, where keys are needed.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
LineName = Annotated[str, typer.Argument(metavar="LINE")]
Version = Annotated[str | None, typer.Argument(metavar="[VERSION]", help="Such as v7; by default the obvious one.")]


class Scope(StrEnum):
    """What a key may do."""

    INFER = "infer"
    FEEDBACK = "feedback"
    ADMIN = "admin"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `learnd`."""
    from service.errors import LearndError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="learnd")
    except LearndError as error:
        typer.echo(f"learnd: {error.message}", err=True)
        sys.exit(1)


@app.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Where to listen.")] = None,
    port: Annotated[int | None, typer.Option(help="Where to listen.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join.")] = None,
) -> None:
    """Run the daemon in the foreground; Ctrl-C stops it in order."""
    settings = _settings(config, _given(host=host, port=port, data_dir=data_dir, address=address))
    from service.app import serve as run

    run(settings)


@app.command()
def status(as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Show lines, versions, feedback, the running job and the trial on one screen."""
    with _client(url, key, config) as client:
        said = client.get("/api/status")
    if as_json:
        _print_json(said)
        return
    from service import screens

    screens.show(screens.status(said))


@app.command()
def versions(line: LineName, as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """List a line's versions with their scores."""
    with _client(url, key, config) as client:
        said = client.get(f"/api/lines/{line}/versions")
    if as_json:
        _print_json(said)
        return
    from service import screens

    screens.show(screens.versions(line, said["data"]))


@app.command()
def train(line: LineName, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Start a learning job now, whatever the triggers say."""
    with _client(url, key, config) as client:
        _print_json(client.post(f"/api/lines/{line}/train"))


@app.command()
def promote(line: LineName, version: Version = None, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Make a version the champion: the candidate, unless another is named."""
    with _client(url, key, config) as client:
        _print_json(client.post(f"/api/lines/{line}/promote", {"version": version}))


@app.command()
def rollback(line: LineName, version: Version = None, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """End the trial, or else go back: to the previous champion, unless another version is named."""
    with _client(url, key, config) as client:
        _print_json(client.post(f"/api/lines/{line}/rollback", {"version": version}))


@feedback_commands.command("import")
def import_feedback(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="NDJSON: one body of /feedback a line.")],
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Send a file of feedback; each line is acknowledged or refused by its number. Safe to repeat when lines have ids."""
    from service import importing

    with _client(url, key, config) as client:
        done = importing.send(file, client)
    typer.echo(f"{done.stored} stored, {done.repeated} known before, {done.pending} wait, {done.refused} refused")
    if done.refused:
        raise typer.Exit(1)


@base_commands.command("prepare")
def prepare_base(
    name: Annotated[str, typer.Argument(metavar="NAME", help="builtin:smollm2-135m, a folder, or a hub id.")],
) -> None:
    """Fetch or convert a base model into the cache, so that `serve` starts at once."""
    from learners.base import BaseMissing, prepare
    from service.errors import BaseUnavailable

    try:
        base = prepare(name, say=lambda what: typer.echo(what, err=True))
    except BaseMissing as error:
        raise BaseUnavailable(str(error)) from None
    typer.echo(f"{base.name} is ready in {base.path} (weights {base.weights_digest[:12]})")


@key_commands.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Who will use it; shows in records and logs.")],
    scope: Annotated[list[Scope] | None, typer.Option(help="What it may do; repeat for more.")] = None,
) -> None:
    """Make an API key: prints it once, and the settings that let it in (a digest only)."""
    import hashlib
    import re
    import secrets

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise typer.BadParameter("use small letters, digits, '-' and '_', at most 63")
    key = f"learnd-{secrets.token_urlsafe(32)}"
    scopes = ", ".join(f'"{one}"' for one in scope or [Scope.INFER, Scope.FEEDBACK])
    typer.echo(f"{key}\n\n[keys.{name}]")
    typer.echo(f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\nscopes = [{scopes}]')


@app.command()
def doctor(as_json: AsJson = False, config: Config = None) -> None:
    """Check the machine, the environment, ports, disk and the model; say what to do."""
    from dataclasses import asdict

    from service import doctor as checks

    found = checks.examine(_settings(config, {}))
    if as_json:
        _print_json({"checks": [asdict(one) for one in found]})
    else:
        from service import screens

        screens.show(screens.checks(found))
    if any(one.level == "fail" for one in found):
        raise typer.Exit(1)


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as one last line of JSON.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the report and the daemon's log go.")] = Path("demo-report"),
    is_kept: Annotated[bool, typer.Option("--keep", help="Leave the daemon's data directory behind.")] = False,
) -> None:
    """Watch a care desk learn two skills while it works."""
    from service.demo.story import Options, run

    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` has it ignored: the daemon must not stay behind
        signal.signal(number, signal.default_int_handler)
    try:
        raise typer.Exit(run(Options(folder=folder, is_json=as_json, is_kept=is_kept)))
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


def _settings(config: Path | None, flags: dict[str, Any]) -> Settings:
    from service.settings_file import load

    here = Path("learnd.toml")
    return load(config or (here if here.exists() else None), flags)


def _given(host: str | None, port: int | None, data_dir: Path | None, address: str | None) -> dict[str, Any]:
    """Flags as a part of the tree of settings, those left out left out."""
    flags: dict[str, Any] = {
        "http": {name: value for name, value in (("host", host), ("port", port)) if value is not None},
        "cluster": {"address": address} if address else {},
        "data_dir": data_dir,
    }
    return {name: value for name, value in flags.items() if value}


def _client(url: str | None, key: str | None, config: Path | None) -> Client:
    from service.client import Client

    if url is None:
        http = _settings(config, {}).http
        host = "127.0.0.1" if http.host in {"0.0.0.0", "::"} else http.host  # noqa: S104 - compared, not bound
        url = f"http://{f'[{host}]' if ':' in host else host}:{http.port}"
    return Client(url, key or os.environ.get("LEARND_KEY"))


def _print_json(value: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
