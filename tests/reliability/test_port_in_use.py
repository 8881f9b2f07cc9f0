"""Two runs that are started on one machine with one port: the second ends in a line that says what to do."""

import socket

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Forked, run_script, variables_of
from tests.train.runs import pretrain


def test_a_port_that_another_run_holds_is_named(tmp_path):
    data = make_beton(tmp_path, [(24, 20)] * 48).path
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        words = [str(word) for word in pretrain(tmp_path / "runs", data, launcher=())]
        first = Forked(tmp_path / "output", variables_of(0, 2, port), run_script, words)
        try:
            assert first.end() == 2, first.text()[-3000:]
        finally:
            first.kill()
    (line,) = first.errors()
    assert f"127.0.0.1:{port}" in line
    assert "--master_port" in line
    assert "Traceback" not in first.text()
    assert not (tmp_path / "runs").exists()
