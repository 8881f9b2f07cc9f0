"""Conversions in processes that kill themselves at a chosen step on the disk.

`python -m tests.tools.killed_conversions` is a server: it imports the converter once and forks for each request, a line
of JSON. A step is a call that changes what lies on the disk, before and after it, and in the midst of a write.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

STEPS = ("fsync", "fdatasync", "replace", "unlink", "open")


class Server:
    """Asks the server; a process of its own."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.tools.killed_conversions"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def convert(self, source, dest, *, kill_at=0, **options):
        """Convert in a child, which is killed at that step, 0: never; returns its exit code, or minus the signal."""
        request = {"source": str(source), "dest": str(dest), "kill_at": kill_at, **options}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def serving():
    server = Server()
    try:
        yield server
    finally:
        server.close()


class KilledAt:
    """Counts steps and kills its own process at one of them."""

    def __init__(self, step):
        self._left = step

    def __call__(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call):
        def stepping(*arguments, **keywords):
            self()
            result = call(*arguments, **keywords)
            self()
            return result

        return stepping

    def write_all(self, file, data):
        view = memoryview(data)
        self()
        file.write(view[: len(view) // 2])
        self()
        file.write(view[len(view) // 2 :])
        self()


def convert_and_die(request):
    from tools import beton_writer, convert_journal, convert_output
    from tools.convert import convert_images
    from tools.convert_places import Places
    from tools.image_encoding import EncodeOptions

    step = KilledAt(request["kill_at"])
    for name in STEPS:
        setattr(os, name, step.around(getattr(os, name)))
    beton_writer.write_all = convert_journal.write_all = step.write_all
    convert_output.JOURNAL_SECONDS = 0.0
    places = Places(dest=Path(request["dest"]), shard_size=request.get("shard_size"), page_size=1 << 21)
    options = EncodeOptions(**request.get("encode", {}))
    convert_images(Path(request["source"]), places, options, workers=2, force=request.get("force", False))


def main():
    import tools.convert

    assert tools.convert
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 — until the end of the process
            convert_and_die(request)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
