"""What no test may leave to the next one of its process."""

import signal

import pytest

from train.interruption import SIGNALS


@pytest.fixture(autouse=True)
def _handlers_of_signals():
    """A run that was stopped ignores signals from then on; whoever runs the tests shall not, nor what they start."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
