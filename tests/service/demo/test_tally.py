from service.demo.tally import Reply, Score, Tally
from service.demo.texts import Text


def never_trained(word: str) -> Text:
    return next(one for i in range(99) if not (one := Text("airline", f"{word} {i}", "positive")).is_taught)


def taught() -> Text:
    return next(one for i in range(99) if (one := Text("airline", f"taught {i}", "positive")).is_taught)


def reply(text: Text, content: str, model: str) -> Reply:
    return Reply("r", text, content, model, at=0.0)


def test_only_never_trained_texts_count_and_each_once_a_version():
    tally = Tally()
    one, two = never_trained("one"), never_trained("two")
    tally.add(reply(one, "Positive", "desk@v1"))
    tally.add(reply(one, "negative", "desk@v1"))
    tally.add(reply(two, "I am not sure", "desk@v1"))
    tally.add(reply(one, "no idea", "smollm2-135m"))
    tally.add(reply(taught(), "positive", "desk@v1"))
    tally.fail("timeout")
    assert tally.score("airline", "v1") == Score(1, 2)
    assert tally.score("airline", "base") == Score(0, 1)
    assert tally.requests == 6


def test_versions_are_ordered_by_number_with_the_base_first():
    tally = Tally()
    for model in ("desk@v10", "desk@v2", "smollm2-135m"):
        tally.add(reply(never_trained("x"), "positive", model))
    assert tally.versions() == ["base", "v2", "v10"]
    assert tally.matrix() == {"airline": {"base": Score(1, 1), "v2": Score(1, 1), "v10": Score(1, 1)}}


def test_nothing_asked_is_no_accuracy():
    assert Score().accuracy is None
