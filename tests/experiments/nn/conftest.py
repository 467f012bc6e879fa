"""Every test of the parts starts from the same random numbers."""

import pytest


@pytest.fixture(autouse=True)
def _seeded(seeded: None) -> None: ...
