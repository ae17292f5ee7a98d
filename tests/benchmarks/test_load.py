"""The benchmarks' load, against a server that says what it is told to."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import _load as load

WORDS = ["one ", "two ", "three"]


def events(words, *, ends=True):
    said = [{"model": "m", "choices": [{"delta": {"content": word}}]} for word in words]
    said.append({"model": "m", "choices": [], "usage": {"completion_tokens": len(words)}})
    return b"".join(f"data: {json.dumps(one)}\n\n".encode() for one in said) + (b"data: [DONE]\n\n" if ends else b"")


def serving(status, body, cut):
    """A server whose reply comes in chunks of `cut` bytes, wherever that cuts it."""

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(size.split(b":")[1]))
        writer.write(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\nX-Model-Version: m\r\n\r\n".encode())
        for start in range(0, len(body), cut):
            piece = body[start : start + cut]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    return asyncio.start_server(answer, "127.0.0.1", 0)


async def asked(status, body, cut=1000):
    async with await serving(status, body, cut) as server:
        return await load.ask(server.sockets[0].getsockname()[1], "m", "hello", 3)


@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_a_reply_is_read_however_it_is_cut(cut):
    reply = await asked(200, events(WORDS), cut)
    assert (reply.error, reply.text, reply.tokens, len(reply.at)) == ("", "one two three", 3, 3)
    assert (reply.named, reply.header) == ("m", "m")
    assert 0 < reply.ttft <= reply.ended - reply.began
    assert len(reply.gaps) == 2


async def test_a_stream_without_its_end_has_failed():
    assert (await asked(200, events(WORDS, ends=False))).error == "the stream broke off"


async def silent(reader, writer):
    """Takes a request and says nothing until the client has gone."""
    while await reader.read(1000):
        pass
    writer.close()


async def test_a_turn_that_takes_too_long_is_cut_off():
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TimeoutError):
            await load.driven(port, ["m"], 2, 1, load.prompts(0), tokens=3, within=0.05)


async def test_a_server_that_hangs_up_without_a_word_is_an_error_and_no_exception():
    async def hangs_up(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hangs_up, "127.0.0.1", 0) as server:
        assert (await load.ask(server.sockets[0].getsockname()[1], "m", "hello")).error


async def test_a_refusal_has_failed():
    assert (await asked(503, b"busy")).error.startswith("http_503")


async def test_nobody_there_is_an_error_and_no_exception():
    assert "Error" in (await load.ask(1, "m", "hello")).error


def test_a_turn_counts_what_came_and_not_what_failed():
    good = load.Reply("m", 0.0, at=[0.5, 0.7, 1.0], tokens=3)
    turn = load.Turn([good, load.Reply("m", 0.0, error="http_500")], seconds=2.0)
    assert (turn.failed, turn.tokens_per_second, turn.requests_per_second, turn.ttfts) == (1, 1.5, 0.5, [0.5])
    assert turn.pauses == pytest.approx([0.2, 0.3])


def test_quantiles_are_interpolated():
    assert [load.quantile([4.0, 1.0, 2.0, 3.0], q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]


def test_prompts_share_no_prefix():
    asked = [prompt for prompt, _ in zip(load.prompts(5), range(200), strict=False)]
    assert len({prompt.split()[0] for prompt in asked}) == 200
