"""What the fault tests have shown, a row a test: `make reliability` writes the table of docs/results/reliability.md.

python -m tests.reliability.record ROWS.jsonl > docs/results/reliability.md
"""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

RECORD_VARIABLE = "TWINVIEW_RECORD"
COLUMNS = {
    "fault": "fault",
    "done": "what was done",
    "runs": "runs",
    "lost_steps": "lost steps",
    "result": "result",
}
HEAD = """# Reliability

What was done to running trainings, and what became of them: real processes, real signals, real file systems. A row is
written by its test after its last assertion. *Lost steps* are those that had to be done again after the resume.

    make reliability

"""


def record(*, fault, done, runs, lost_steps, result):
    """Note one row, where `make reliability` asks for it; `runs` and `lost_steps` are what was counted."""
    path = os.environ.get(RECORD_VARIABLE)
    if path:
        row = {"fault": fault, "done": done, "runs": runs, "lost_steps": lost_steps, "result": result}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table(rows):
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(str(row[name]) for name in COLUMNS) for row in sorted(rows, key=lambda row: row["fault"])]
    return "\n".join(f"| {line} |" for line in lines)


def surroundings():
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return (
        f"{date.today()}, {platform.system()} {platform.release()}, {os.cpu_count()} CPU cores, no GPU, "
        f"Python {platform.python_version()}, {packages}, commit {commit.stdout.strip()}."
    )


if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    print(f"{HEAD}{surroundings()}\n\n{table(rows)}")
