"""The benchmarks' own marker, which their modules use when they are imported."""

from benchmarks.conftest import MARKER


def pytest_configure(config):
    config.addinivalue_line("markers", MARKER)
