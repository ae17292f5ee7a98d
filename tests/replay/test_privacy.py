import pytest

from replay.privacy import redact


def said(text, **options):
    return redact(({"role": "user", "content": text},), "", **options)[0][0]["content"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("write to anna.b+x@mail.example.org, please", "write to <EMAIL_1>, please"),
        ("call +44 20 7946 0958 now", "call <PHONE_1> now"),
        ("call (212) 736-5000.", "call <PHONE_1>."),
        ("card 4111 1111 1111 1111 expired", "card <CARD_1> expired"),
        ("to DE89 3704 0044 0532 0130 00 by noon", "to <IBAN_1> by noon"),
        ("my number is 536-90-4399", "my number is <SSN_1>"),
        ("from 192.168.7.12 and 2001:db8::1", "from <IP_1> and <IP_2>"),
    ],
)
def test_what_identifies_somebody_gives_way(text, written):
    assert said(text) == written


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # the check digit is wrong
        "to DE89 3704 0044 0532 0130 01",
        "flight 1234 at 10:30 on 2015-02-17, gate B12, 1:1",
        "@united I love @JetBlue #fail http://t.co/abc",
        "version 1.2.3.4.5 of 300.1.2.3",
        "order 20150217-4711 of $1,234.56",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert said(text) == text


def test_one_value_has_one_placeholder_throughout_an_example():
    messages = ({"role": "user", "content": "a@x.org or b@x.org?"}, {"role": "assistant", "content": "Say."})
    again = (*messages, {"role": "user", "content": "A@x.org!"})
    found, reply = redact(again, "I wrote to b@x.org.")
    assert [message["content"] for message in found] == ["<EMAIL_1> or <EMAIL_2>?", "Say.", "<EMAIL_1>!"]
    assert reply == "I wrote to <EMAIL_2>."


def test_what_is_the_houses_own_stays():
    assert said("call +44 20 7946 0958 or +44 20 7946 0959", keep=["+442079460958"]) == "call +44 20 7946 0958 or <PHONE_1>"


def test_the_region_says_how_a_number_is_written_without_a_plus():
    assert said("ruf 030 901820 an", region="DE") == "ruf <PHONE_1> an"
    assert said("ruf 030 901820 an", region="US") == "ruf 030 901820 an"
