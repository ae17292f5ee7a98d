"""A true keeper on a folder of its own, with a launcher that trains nothing and a clock that the test turns."""

import pytest
from world import BASE, QUICK, FakeLauncher, validate

from service.keeper import Keeper
from service.settings import Settings


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path, **QUICK)


@pytest.fixture
def launcher():
    return FakeLauncher()


@pytest.fixture
async def keeper(settings, launcher, clock):
    keeper = Keeper(settings, BASE, launcher, clock, validate)
    await keeper.start()
    yield keeper
    await keeper.close()
