import httpx
import pytest

from service.demo import post as room
from service.demo.post import Post


class Box:
    """A `/feedback` that answers from a list, `None` for a broken connection, and keeps what came."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.ids: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.ids.append(httpx.Response(200, content=request.content).json()["id"])
        answer = self.answers.pop(0)
        if answer is None:
            raise httpx.ConnectError("gone")
        return httpx.Response(answer, text="because")


async def deliver(box: Box) -> Post:
    async with httpx.AsyncClient(transport=httpx.MockTransport(box), base_url="http://daemon") as http:
        post = Post(http)
        post.send("chat-1", "thumb", True, "customer", 0.0)
        await post.drain()
    return post


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(room, "RETRY_SECONDS", 0.0)


async def test_only_a_2xx_counts_and_a_repeat_has_the_same_id():
    box = Box(None, 503, 202)
    post = await deliver(box)
    assert post.acknowledged == 1
    assert box.ids == ["thumb-chat-1"] * 3
    assert post.refused == []


async def test_a_refusal_is_not_repeated():
    box = Box(400)
    post = await deliver(box)
    assert post.acknowledged == 0
    assert post.refused == ["feedback thumb-chat-1: 400: because"]


async def test_silence_ends_as_a_refusal():
    post = await deliver(Box(None, None, None, None))
    assert "gone" in post.refused[0]
