import pytest

from sftlab.hub import stand_in


@pytest.fixture(scope="session")
def address():
    """A stand-in for the Hub."""
    with stand_in.serving() as address:
        yield address
