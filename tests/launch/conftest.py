"""Places where the scripts of launch/ are tried."""

from collections.abc import Iterator

import pytest
from cloud import Cloud


@pytest.fixture
def cloud(tmp_path) -> Iterator[Cloud]:
    """A cloud with nothing in it."""
    made = Cloud(tmp_path)
    yield made
    made.close()
