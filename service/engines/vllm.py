"""vLLM as an engine: its own OpenAI server over `AsyncLLM`, in this process, one hop from the client.

With the plug-in beside it, the only door to vLLM. Adapters are loaded under our own names and ids, never in place: an
adapter that is reloaded under its name would be served with the old one's prefix cache (vllm#42125).
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, Self

import torch
from starlette.types import ASGIApp

from learners.base import adaptable_modules
from learners.precision import fastest
from replay.records import Message
from service.errors import ArtifactInvalid, InvalidRequest, NotReady, SettingsError
from service.settings import Settings

SWITCH = "LEARND_CPU_LORA"
"""The variable that turns the plug-in off."""

LOOKS_FOR_NAN = "VLLM_COMPUTE_NANS_IN_LOGITS"
"""The variable that lets vLLM count, in each step, the logits of each reply that are no numbers."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The maximal ranks that vLLM can be built for."""

SPARE_ADAPTERS = 2
"""Kept beside the resident ones, so that loading the next before dropping the last evicts none that is in use."""


class NoNumbers(RuntimeError):
    """A reply's logits are no numbers (NaN): vLLM would go on with the first token of its vocabulary, and answer with 200."""


class HasPath(Protocol):
    """A base model that is ready on disk: `learners.base.BaseModel` is one."""

    @property
    def path(self) -> Path:
        """Its Hugging Face folder."""
        ...


class VllmEngine:
    """An `Engine` over vLLM; made by `start`."""

    def __init__(self, client: Any, app: Any, tokenizer: Callable[[], Any], longest: int) -> None:
        """`tokenizer` gives the base's, `longest` is how many tokens may be scored at once."""
        self._client = client
        self._app = app
        self._tokenizer = tokenizer
        self._longest = longest
        self._adapters: dict[str, Any] = {}
        """The lora requests by name. vLLM's server routes by a table of its own, kept equal to this one."""

    @classmethod
    async def start(cls, settings: Settings, base: HasPath) -> Self:
        """Start the engine's processes and build its app; returns when it can answer."""
        os.environ |= cls.environment(settings)
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments(settings, base.path))
        engine_args = AsyncEngineArgs.from_cli_args(args)
        if not settings.engine.gpus and engine_args.distributed_executor_backend is None:
            engine_args.distributed_executor_backend = UniProcExecutor  # the model beside its scheduler: one process less
        client = AsyncLLM.from_engine_args(engine_args)
        client.generate = numbers_only(client.generate)
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        app.state.server = SimpleNamespace(should_exit=False)  # what vLLM's error handler tells to stop; Serve replaces us
        return cls(client, app, cache(lambda: AutoTokenizer.from_pretrained(base.path)), client.model_config.max_model_len - 1)

    @staticmethod
    def environment(settings: Settings) -> dict[str, str]:
        """What vLLM reads from its environment: set before it is imported, inherited by its processes."""
        variables = {
            "HF_HUB_OFFLINE": "1",  # the base lies on disk by now: nothing is to be fetched
            "VLLM_API_KEY": "",  # keys are the gateway's business
            SWITCH: "1" if settings.engine.has_grouped_lora else "0",
            LOOKS_FOR_NAN: "1" if settings.engine.checks_logits else "0",
            "OMP_NUM_THREADS": str(settings.engine.threads or os.cpu_count() or 1),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas and jobs share the cores: the kernel moves them better
        }
        if not settings.engine.gpus:
            variables |= {
                "TORCH_COMPILE_DISABLE": "1",  # the first log-probs would wait for a C++ compiler, if there is one
                "VLLM_CPU_INT4_W4A8": "0",  # 4-bit weights alone are quantized, as training has it: inputs keep their precision
            }
        if not settings.telemetry.is_on:
            variables |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        return variables

    @property
    def app(self) -> ASGIApp:
        """The FastAPI app that vLLM builds."""
        return self._app  # type: ignore[no-any-return] # vLLM is untyped

    @property
    def is_dead(self) -> bool:
        """Whether vLLM has lost its core."""
        return bool(self._client.errored)

    async def load(self, name: str, path: Path, int_id: int) -> None:
        """Load the adapter in `path`; vLLM reads and checks it before it evicts anything."""
        if name in self._adapters:
            return
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=name, lora_int_id=int_id, lora_path=str(path))
        try:
            await self._client.add_lora(request)
        except Exception as error:
            await self.check()
            raise ArtifactInvalid(f"vLLM cannot load {name} from {path}: {error}") from error
        self._adapters[name] = self._served[name] = request

    async def unload(self, name: str) -> None:
        """Take the adapter out of vLLM's server, then out of the engine."""
        request = self._adapters.pop(name, None)
        if request is not None:
            self._served.pop(name, None)
            await self._client.remove_lora(request.lora_int_id)

    async def logprobs(self, name: str | None, token_ids: Sequence[int]) -> list[float]:
        """Score the tokens as a prompt; the prefix cache is not read for these. No number is a score where logits are none."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import SamplingParams

        ids = list(token_ids)
        outputs = self._client.generate(
            TokensPrompt(prompt_token_ids=ids),
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
            f"probe-{uuid.uuid4().hex}",
            lora_request=self._adapters[name] if name is not None else None,
        )
        try:
            *_, last = [output async for output in outputs]
        except NoNumbers:
            return [math.nan] * (len(ids) - 1)
        return [found[token].logprob for token, found in zip(ids[1:], last.prompt_logprobs[1:], strict=True)]

    async def score(self, name: str | None, messages: Sequence[Message], reply: str) -> list[float]:
        """Score the reply as it would be trained on: by the checkpoint's own template, a prompt that is too long cut short."""
        from learners.encode import Unencodable, encode

        try:
            encoded = await asyncio.to_thread(encode, self._tokenizer(), messages, reply, self._longest)
        except Unencodable as error:
            raise InvalidRequest(f"the reply cannot be scored: {error}") from None
        return (await self.logprobs(name, encoded.input_ids))[-encoded.reply_length :]

    async def check(self) -> None:
        """Ask vLLM whether its core lives."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._client.check_health()
        except EngineDeadError as error:
            raise NotReady(f"vLLM's engine is dead, this replica must be replaced: {error}") from error

    async def close(self) -> None:
        """End vLLM's processes; it blocks, so it runs in a thread."""
        await asyncio.to_thread(self._client.shutdown)

    @property
    def _served(self) -> dict[str, Any]:
        return self._app.state.openai_serving_models.lora_requests  # type: ignore[no-any-return] # vLLM is untyped


def numbers_only(generate: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """VLLM's `generate`, which raises `NoNumbers` once vLLM has found NaN among the logits of a reply, and lets it go.

    vLLM looks where `LOOKS_FOR_NAN` is set, and tells nobody but its own statistics, which ride on each output
    (without them, under `--disable-log-stats`, nothing is known).
    """

    async def checked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(generate(*args, **kwargs)) as outputs:  # closed at once: then vLLM computes no more of it
            async for output in outputs:
                if output.metrics is not None and output.metrics.is_corrupted:
                    raise NoNumbers(f"the logits of {output.request_id} are no numbers (NaN)")
                yield output

    return checked


def _dtype(settings: Settings) -> str:
    base = settings.base
    if settings.engine.gpus:
        return base.dtype
    if base.dtype == "float32" and base.quantization.startswith("int8") and torch.cpu.get_capabilities().get("amx_int8"):
        raise SettingsError('base.dtype: vLLM multiplies int8 by bf16 alone on a CPU with AMX: leave it out, or say "bfloat16"')
    return fastest() if base.dtype == "auto" else base.dtype


def arguments(settings: Settings, folder: Path) -> list[str]:
    """The settings as vLLM's command line has them; `engine.extra_args` come last and win. Raises `SettingsError`."""
    base, engine = settings.base, settings.engine
    options = {
        "model": str(folder),
        "served-model-name": base.served_name,
        "dtype": _dtype(settings),
        "max-model-len": base.max_model_len,
        "max-num-seqs": engine.max_num_seqs,
        "max-loras": base.max_resident,
        "max-cpu-loras": base.max_resident + SPARE_ADAPTERS,
        "max-lora-rank": min(rank for rank in RANKS if rank >= base.max_rank),
    }
    layers = sorted({module.rpartition(".")[2] for module in adaptable_modules(folder)})
    # Named, so that vLLM leaves the head alone: in a batch of several, prompt log-probs through a head with LoRA end its engine.
    flags = ["--enable-lora", "--lora-target-modules", *layers]
    if settings.engine.gpus:
        options["gpu-memory-utilization"] = engine.gpu_memory_utilization
    else:
        options["kv-cache-memory-bytes"] = int(engine.kv_cache_gib * 2**30)
        flags.append("--enforce-eager")  # compiling takes a minute of the start and gains nothing on CPUs
    if engine.tool_call_parser:
        options["tool-call-parser"] = engine.tool_call_parser
        flags.append("--enable-auto-tool-choice")
    return [*(f"--{name}={value}" for name, value in options.items()), *flags, *engine.extra_args]
