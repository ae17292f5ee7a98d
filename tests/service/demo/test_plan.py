import re
import tomllib

from service.demo.plan import BASE, LINE, Plan, settings_text
from service.demo.texts import INSTRUCTIONS
from service.settings import Settings


def test_the_demo_s_settings_are_settings(tmp_path):
    settings = Settings(**tomllib.loads(settings_text(tmp_path / 'a "quoted" folder', 8123)))
    assert settings.http.port == 8123
    assert settings.data_dir == tmp_path / 'a "quoted" folder'
    assert settings.base.served_name == BASE
    assert settings.lines[LINE].gate.score == "exact_match"


def test_each_skill_is_a_slice_of_its_own(tmp_path):
    slices = Settings(**tomllib.loads(settings_text(tmp_path, 8123))).lines[LINE].slices
    for skill, instruction in INSTRUCTIONS.items():
        assert [name for name, pattern in slices.items() if re.search(pattern, instruction)] == [skill]


def test_the_agents_have_time_for_enough_corrections(tmp_path):
    settings = Settings(**tomllib.loads(settings_text(tmp_path, 8123)))
    spare = Plan().corrections - settings.lines[LINE].trigger.min_examples
    assert 0 <= spare < settings.lines[LINE].trigger.min_examples, "enough for one job a skill, not for two"


def test_thumbs_come_within_the_metric_s_window(tmp_path):
    settings = Settings(**tomllib.loads(settings_text(tmp_path, 8123)))
    assert Plan().thumb_delay_seconds[1] < settings.feedback.metrics["thumb"].window_seconds


def test_the_demo_s_candidates_are_tested_alone(tmp_path):
    rollout = Settings(**tomllib.loads(settings_text(tmp_path, 8123))).lines[LINE].rollout
    assert (rollout.multiplicity, rollout.alpha_promote, rollout.weights) == ("per_test", 0.05, (0.5,))
