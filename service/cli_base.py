"""`learnd base`: what is served and learned on, made ready, or made anew from what a line has learned. Imports stay inside."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from learners.base import BaseModel

base_commands = typer.Typer(help="Base models.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="NAME", help="builtin:smollm2-135m, a folder, or a hub id.")]


class Quantization(StrEnum):
    """What `base.quantization` may be."""

    NONE = "none"
    INT8 = "int8"
    INT8_LAYERS = "int8-layers"
    FP8 = "fp8"
    INT4 = "int4"


@base_commands.command("prepare")
def prepare_base(
    name: Source,
    quantization: Annotated[Quantization, typer.Option(help="As base.quantization: made and measured once.")] = Quantization.NONE,
) -> None:
    """Fetch, convert or quantize a base model into the cache, so that `serve` starts at once."""
    base = _prepared(name, quantization)
    typer.echo(f"{base.name} is ready in {base.path} (weights {base.weights_digest[:12]})")


@base_commands.command()
def tune(
    name: Source,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="As `learnd examples LINE` prints them.")],
    folder: Annotated[Path, typer.Argument(help="Where the new base goes; must not be there yet.")],
    epochs: Annotated[float, typer.Option(min=0.01)] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="Full fine-tuning wants a small one.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int, typer.Option(min=32, help="Tokens of an example.")] = 1024,
    seed: int = 0,
) -> None:
    """Train all weights of a small base on a line's examples; what comes of it is a base of its own, for `base.source`."""
    from learners.whole import Untunable, tune
    from service import lessons, screens
    from service.errors import BaseUnavailable
    from service.settings import Learning

    learning = Learning(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, max_length=max_length, seed=seed)
    given, base = lessons.read(file), _prepared(name, Quantization.NONE)
    try:
        with screens.progress() as report, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            tuned = tune(base, given, folder.absolute(), learning.model_dump(mode="json"), report)
    except Untunable as error:
        raise BaseUnavailable(str(error)) from None
    screens.show(screens.tuned(tuned))


def _prepared(name: str, quantization: Quantization) -> BaseModel:
    from learners.base import BaseMissing, prepare
    from service.errors import BaseUnavailable

    try:
        return prepare(name, say=lambda what: typer.echo(what, err=True), quantization=quantization)
    except BaseMissing as error:
        raise BaseUnavailable(str(error)) from None
