import hashlib

import pytest
from starlette.datastructures import Headers

from service.api.auth import Keyring, authorization
from service.errors import Forbidden, Unauthenticated
from service.settings import Key, Settings


def digest(secret):
    return hashlib.sha256(secret.encode()).hexdigest()


@pytest.fixture
def keyring():
    keys = {
        "app": Key(sha256=digest("s3cret"), scopes=("infer", "feedback")),
        "ops": Key(sha256=digest("boss"), scopes=("admin",)),
    }
    return Keyring(Settings(keys=keys))


def test_a_key_is_known_by_its_digest_and_named(keyring):
    assert keyring.check("Bearer s3cret", "infer") == "app"
    assert keyring.check("bearer  boss ", "admin") == "ops"


def test_any_scope_will_do_where_none_is_asked(keyring):
    assert keyring.check("Bearer boss", None) == "ops"


def test_a_key_without_the_scope_is_forbidden_and_told_what_it_has(keyring):
    with pytest.raises(Forbidden, match="'app' lacks the scope 'admin': it has infer, feedback"):
        keyring.check("Bearer s3cret", "admin")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic s3cret", "Bearer wrong", f"Bearer {digest('s3cret')}", "Bearer ä"]
)
def test_everything_else_is_unauthenticated(keyring, header):
    with pytest.raises(Unauthenticated):
        keyring.check(header, "infer")


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-api-key": "s3cret"}, "app"),
        ({"x-api-key": "boss", "authorization": "Bearer s3cret"}, "app"),
        ({"x-api-key": "s3cret", "authorization": ""}, "app"),
        ({"x-api-key": "wrong"}, None),
        ({"x-api-key": ""}, None),
        ({"x-api-key": "s3cret", "authorization": "Bearer wrong"}, None),
        ({"api-key": "s3cret"}, None),
    ],
)
def test_anthropic_s_header_says_the_same_key(keyring, headers, found):
    told = authorization(Headers(headers))
    if found:
        assert keyring.check(told, "infer") == found
    else:
        with pytest.raises(Unauthenticated) as caught:
            keyring.check(told, "infer")
        assert "s3cret" not in caught.value.message
        assert "wrong" not in caught.value.message


def test_without_keys_everybody_is_anonymous():
    assert Keyring(Settings()).check(None, "admin") == "anonymous"
