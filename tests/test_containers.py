"""The container files against the project: what they copy, install and start is there."""

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions():
    """(instruction, its words) of each line of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], shlex.split(line)[1:]) for line in text.splitlines() if line]


def test_every_file_that_is_copied_is_there():
    copied = [word for name, words in instructions() if name == "COPY" for word in words[:-1]]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path


def test_what_setup_reads_is_copied_before_it_runs():
    order = instructions()
    setup = next(i for i, (name, words) in enumerate(order) if name == "RUN" and words[:2] == ["make", "setup"])
    copied = {word for name, words in order[:setup] if name == "COPY" for word in words[:-1]}
    requirements = {path.name for path in ROOT.glob("requirements*.txt")}
    assert copied >= requirements | {"Makefile", "constraints.txt", "tools/setup.sh"}


def test_the_packages_are_those_that_setup_asks_for():
    words = " ".join(word for name, words in instructions() if name == "RUN" for word in words)
    user_packages = (ROOT / "tools/setup.sh").read_text().split("if [ $kind = dev ]")[0]
    for package in re.findall(r"packages\+=\(([\w+-]+)\)", user_packages):
        assert f" {package} " in words, package


def test_the_development_container_builds_a_stage_that_exists():
    config = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    stages = [words[2] for name, words in instructions() if name == "FROM" and len(words) > 2]
    assert config["build"]["target"] in stages
    assert (ROOT / ".devcontainer" / config["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    target = config["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert config["workspaceFolder"] == next(words[0] for name, words in instructions() if name == "WORKDIR")
