from __future__ import annotations

import pytest
from watching import Ranks


@pytest.fixture
def ranks():
    made = Ranks(3)
    yield made
    made.close()
