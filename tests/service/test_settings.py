import hashlib

import pytest

from service.errors import SettingsError
from service.settings_file import load


def write(tmp_path, text):
    path = tmp_path / "learnd.toml"
    path.write_text(text)
    return path


def test_defaults_are_complete():
    settings = load()
    assert settings.http.host == "127.0.0.1"
    assert settings.base.served_name == "smollm2-135m"
    assert list(settings.lines) == ["default"]


def test_fp8_is_taken_where_the_engine_has_a_gpu(tmp_path):
    assert load(write(tmp_path, "[base]\nquantization = 'fp8'\n[engine]\ngpus = 0.5")).base.quantization == "fp8"


def test_flags_win_over_environment_over_file(tmp_path, monkeypatch):
    path = write(tmp_path, "[http]\nport = 1111\nhost = '127.0.0.2'\n[engine]\nreplicas = 2\n")
    monkeypatch.setenv("LEARND_HTTP__PORT", "2222")
    assert load(path).http.port == 2222
    settings = load(path, {"http": {"port": 3333}})
    assert (settings.http.port, settings.http.host, settings.engine.replicas) == (3333, "127.0.0.2", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dta_dir = 'x'", "unknown setting 'dta_dir'; did you mean 'data_dir'?"),
        ("[http]\nprot = 1", "unknown setting 'http.prot'; did you mean 'http.port'?"),
        ("[lines.desk.learning]\nlearning_rat = 1e-3", "did you mean 'lines.desk.learning.learning_rate'?"),
        ("[lines.desk.gate]\nscore = 'bleu'", "lines.desk.gate.score"),
        ("[http]\nhost = '0.0.0.0'", "keys are needed"),
        ("[lines.desk.rollout]\nmetric = 'stars'", "not declared in feedback.metrics (thumb)"),
        ("[lines.desk.learning]\nrank = 64", "over base.max_rank 16"),
        ("[lines.desk.learning]\nstrategy = 'ewc+replay'\nweight_decay = 0.1", "pulls weights to zero"),
        ("[lines.desk.learning]\nstrategy = 'o-lora'\nweight_decay = 0.1", "which `o-lora` freezes"),
        ("[training]\nreport_to = ['mlflow']", "'tensorboard', 'wandb' or 'trackio'"),
        ("[training]\nfsdp = {version = 2}", "set training.workers to 2"),
        ("[training]\nworkers = 2\nfsdp = {version = 2}\ndeepspeed = 'zero.json'", "take one"),
        ("[training]\nworkers = 2\nfsdp = {version = 2}\n[lines.desk.learning]\nstrategy = 'ewc'", "needs whole factors"),
        ("[training]\nis_on_gpu = true\ndeepspeed = 'zero.json'\n[lines.desk.learning]\ninit = 'pissa'", "needs whole factors"),
        ("[training]\ndeepspeed = 'zero.json'", "is for GPUs"),
        ("[base]\nquantization = 'fp8'\n[engine]\ngpus = 0", "fp8 is for GPUs"),
        ("[lines.desk.learning]\ninit = 'pissa'\nweight_decay = 0.1", "frozen half"),
        ("[lines.desk.learning]\ninit = 'orthogonal'\nrank = 3", "even rank"),
        ("[lines.desk.learning]\ninit = 'loftq'", "'pissa' or 'olora'"),
        ("[lines.desk.learning]\nprogressive_mixing = [0.5, 0.25]", "the share of what is new rises"),
        ("[lines.desk.learning]\nprogressive_mixing = [0.0, 1.0]", "greater than 0"),
        ("[lines.desk.rollout]\nweights = []", "at least one"),
        ("[lines.desk.rollout]\nweights = [0.25, 0.75]", "the control group is as large"),
        ("[lines.desk.rollout]\nweights = [0.5, 0.1]", "rising"),
        ("[lines.smollm2-135m]", "it is the base's name"),
        ("[lines.'De sk']", "should match pattern"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, said):
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, text))
    assert said in caught.value.message


def test_an_unknown_variable_is_refused(monkeypatch):
    monkeypatch.setenv("LEARND_HTPP__PORT", "1")
    with pytest.raises(SettingsError, match="did you mean 'http'"):
        load()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "absent.toml")


def test_elsewhere_is_fine_with_a_key(tmp_path):
    digest = hashlib.sha256(b"secret").hexdigest()
    text = f"[http]\nhost = '0.0.0.0'\n[keys.ops]\nsha256 = '{digest}'\nscopes = ['admin']"
    assert load(write(tmp_path, text)).keys["ops"].scopes == ("admin",)
