import pytest

from service.metrics import Metrics
from service.storage import Storage


@pytest.fixture
async def keeper(settings):
    keeper = Storage(settings, Metrics("1", "base"), lambda: 100.0)
    await keeper.open()
    yield keeper
    await keeper.close()
