"""What the servers of a bench serve: a tiny base, and adapters that a daemon's registry knows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _servers import LINES

from learners.base import BaseModel


def tiny_base(folder: Path) -> None:
    """Two random layers and a tokenizer of bytes, in the form of a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=2, max_position_embeddings=4096)).to(
        torch.bfloat16
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_versions(data: Path, base: BaseModel) -> dict[str, Path]:
    """Random adapters, whole and provable, known to the registry of `data`: two live ones on each line, one more on the first.

    Random weights are as fast as learned ones; each changes what is said, so a reply shows who made it.
    """
    import torch

    from learners import adapter, artifact
    from learners.artifact import PROBES
    from learners.evaluate import logprobs

    made: dict[str, Path] = {}
    model, tokenizer = adapter.load_base(base.path, "float32")  # bf16 is slow in torch on many CPUs
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    model = adapter.attach(model, None, rank=16, alpha=32, dropout=0.0, seed=0)
    with torch.no_grad(), adapter.without(model):
        plain = [logprobs(model, ids) for ids in texts]
    for number, name in enumerate([f"{line}@v{n}" for line in LINES for n in (1, 2)] + [f"{LINES[0]}@v3"]):
        torch.manual_seed(number)
        for key, factor in adapter.factors(model).items():
            torch.nn.init.normal_(factor.data, std=0.012 if "lora_B" in key else factor.shape[1] ** -0.5)
        path = data / "versions" / name.replace("@", "/")
        adapter.write(model, path, base.name)
        with torch.no_grad():
            probes = [
                {"token_ids": ids, "adapter": logprobs(model, ids), "base": told} for ids, told in zip(texts, plain, strict=True)
            ]
        line, _, _ = name.partition("@")
        manifest = {"line": line, "learning": {}, "parent": None, "job": f"bench-{name}", "base": base.digests}
        artifact.seal(path, manifest, {"probes": probes})
        made[name] = path
    register(data, base, made)
    return made


def register(data: Path, base: BaseModel, made: Mapping[str, Path]) -> None:
    """Write the versions into the ledger of a daemon that does not run: v1 is each line's previous, v2 its champion."""
    from replay import ledger
    from replay.writer import Writer
    from service import conductor, registry
    from service.artifacts import validator

    validate = validator(base, 16)

    def work(conn: Any) -> None:
        ledger.create(conn)
        conductor.create(conn)
        champions: dict[str, str | None] = {}
        for name, path in made.items():
            line, now = name.partition("@")[0], time.time()
            told: dict[str, Any] = {"digest": validate(path), "parent": None, "scores": {}, "gate": {}, "now": now}
            registry.register(conn, line, f"bench-{name}", path=str(path.relative_to(data / "versions")), **told)
            if not name.endswith("v3"):
                before = champions.get(line)
                registry.crown(conn, line, expected=before, target=name, previous=before, now=now, reason="bench", evidence={})
                champions[line] = name

    writer = Writer(data / "ledger.db")
    try:
        writer.submit(work).result()
    finally:
        writer.close()
