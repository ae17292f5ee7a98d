"""The OpenAI surface with the real engine, asked by the real client."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "What is the capital of France?"}]
ASK_AGAIN = [
    {"role": "user", "content": "What is the capital of Germany?"},
    {"role": "assistant", "content": "The capital of Germany is Berlin."},
    *ASK,
]
"""After an example no other word is nearly as likely as the right one, whichever way a processor rounds."""
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_a_whole_reply(client):
    raw = client.chat.completions.with_raw_response.create(model="desk@base", messages=ASK_AGAIN, max_tokens=8, temperature=0)
    reply = raw.parse()
    assert "Paris" in reply.choices[0].message.content
    assert reply.model == raw.headers["x-model-version"]
    assert len(raw.headers.get_list("x-request-id")) == 1
    assert reply.usage.completion_tokens <= 8


def test_a_stream_says_the_same(client):
    whole = client.chat.completions.create(model="desk", messages=ASK, max_tokens=8, temperature=0)
    chunks = list(client.chat.completions.create(model="desk", messages=ASK, max_tokens=8, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert all(c.usage is None for c in chunks)  # it was not asked for


def test_completions_and_logprobs(client):
    reply = client.completions.create(model="desk", prompt="The capital of France is", max_tokens=3, temperature=0, logprobs=2)
    assert len(reply.choices[0].logprobs.token_logprobs) == 3
    assert all(value <= 0 for value in reply.choices[0].logprobs.token_logprobs)


def test_prompt_logprobs_beside_other_requests(client):
    """Prompts of many lengths scored in one batch: with LoRA on the head, vLLM's engine ends here."""

    def ask(words):
        told = client.completions.create(
            model="desk", prompt="Paris " * words, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
        )
        return len(told.choices[0].prompt_logprobs) >= words

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(2, 14)))


def test_structured_output(client):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    reply = client.chat.completions.create(model="desk", messages=ASK, max_tokens=40, temperature=0, response_format=form)
    assert set(json.loads(reply.choices[0].message.content)) == {"city"}


def test_a_tool_is_called(client):
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "The weather of a city.", "parameters": CITY},
    }
    reply = client.chat.completions.create(
        model="desk@base", messages=ASK, tools=[tool], tool_choice="required", max_tokens=60, temperature=0
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "weather"
    json.loads(call.function.arguments)


def test_models_lists_what_can_be_asked(client):
    names = {model.id for model in client.models.list()}
    assert {"desk", "desk@champion", "smollm2-135m"} <= names


def test_the_base_by_its_own_name(client):
    reply = client.chat.completions.create(model="smollm2-135m", messages=ASK, max_tokens=4, temperature=0)
    assert reply.model == "smollm2-135m"


def test_an_unknown_model_is_told_what_exists(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="dusk", messages=ASK)
    assert "desk" in caught.value.message


def test_what_vllm_refuses_comes_back_as_vllm_says_it(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="desk", messages=ASK, temperature=-1)
    assert "temperature" in caught.value.message


def test_malformed_json_is_refused(daemon):
    reply = httpx.post(f"{daemon.url}/v1/chat/completions", content=b"{nope", headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_adapters_are_not_loaded_by_clients(daemon):
    body = {"lora_name": "x", "lora_path": "/etc"}
    assert httpx.post(f"{daemon.url}/v1/load_lora_adapter", json=body).status_code in {403, 404}


def test_only_loopback_listens(daemon):
    """Neither Ray nor HAProxy nor vLLM opens a port to the network."""
    open_to_all = [
        (process.name(), connection.laddr)
        for process in daemon.processes()
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN" and connection.laddr.ip not in {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    ]
    assert open_to_all == []
