import sys

from service.demo.daemon import Daemon

UP = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); print('up', flush=True)"
POLITE = f"{UP}; signal.sigwait([signal.SIGINT]); print('in order', flush=True)"
STUBBORN = f"{UP}; signal.pause()"


def wait_until_up(daemon: Daemon) -> None:
    while daemon.is_alive and "up" not in daemon.last_words():
        pass


def test_it_is_asked_to_stop_and_its_words_are_kept(tmp_path):
    with Daemon(tmp_path / "learnd.toml", tmp_path / "log", (sys.executable, "-c", POLITE)) as daemon:
        wait_until_up(daemon)
        assert daemon.is_alive
    assert not daemon.is_alive
    assert daemon.last_words() == "up\nin order"


def test_it_is_made_to_stop_when_it_does_not(tmp_path):
    daemon = Daemon(tmp_path / "learnd.toml", tmp_path / "log", (sys.executable, "-c", STUBBORN))
    with daemon:
        wait_until_up(daemon)
        daemon.stop(patience_seconds=0.05)
        assert not daemon.is_alive


def test_a_process_that_ended_by_itself_is_not_alive(tmp_path):
    with Daemon(tmp_path / "learnd.toml", tmp_path / "log", (sys.executable, "-c", "raise SystemExit('no port')")) as daemon:
        while daemon.is_alive:
            pass
        assert daemon.last_words() == "no port"
