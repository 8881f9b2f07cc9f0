"""Every command in every document runs, on a small set, in the order in which it stands there."""

import re

import pytest

from tests.documents.commands import ROOT, Command, commands_of
from tests.documents.workshop import Workshop, make_template

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
IN_EVERY_TEST_RUN = ("README.md", "imagenet.md", "own_images.md", "throughput.md", "evaluation.md")
"""The others wait for `make test-all`."""

RUN_ELSEWHERE = {"formats.md": "tests/tools/test_source_guide.py runs it, and looks at what is written"}

NOT_RUN = {
    "make": "its targets are looked up; continuous integration runs them",
    ".": "activates the environment in which this runs",
    "mkdir": "the workshop has its folders",
    "pip": "would change the environment",
    "wandb": "asks for an account",
    "tensorboard": "serves until it is stopped",
    "tail": "follows until it is stopped",
    "export": "variables of races that are not run here",
    "sbatch": "tests/reliability/test_slurm.py runs the job under a real Slurm",
    ".venv/bin/pre-commit": "would change the repository",
    "python": "pytest and its benchmarks; `make bench-quick` races the most telling ones",
}
"""By first word, why."""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    make_template(folder)
    return folder


def documents_with_commands():
    for document in DOCUMENTS:
        if document.name not in RUN_ELSEWHERE and any(command.is_ours for command in commands_of(document)):
            name = str(document.relative_to(ROOT))
            marks = () if document.name in IN_EVERY_TEST_RUN else (pytest.mark.slow,)
            yield pytest.param(document, id=name, marks=marks)


@pytest.mark.parametrize("document", list(documents_with_commands()))
def test_every_command_of_a_document_runs(document, template, tmp_path):
    workshop = Workshop(tmp_path, template)
    for command in commands_of(document):
        if command.is_ours:
            codes, told = workshop.start(command)
            assert set(codes) == {0}, f"{' '.join(command.words)}\n{told[-3000:]}"
            assert "Traceback" not in told


def test_what_is_not_run_is_named_with_its_reason():
    started = {command.program for document in DOCUMENTS for command in commands_of(document) if not command.is_ours}
    assert started == set(NOT_RUN)


def test_the_words_of_a_block_are_read_as_a_shell_reads_them(tmp_path):
    (tmp_path / "page.md").write_text(
        "```bash\nA=runs/x    # a name\nOMP_NUM_THREADS=2 deepspeed --num_gpus 8 \\\n    train/pretrain.py --name b\n"
        'python -m tools.convert "my photos" $A  # shown\n```\n\n```\nnot --this\n```\n'
    )
    pretrain, convert = commands_of(tmp_path / "page.md")
    assert pretrain == Command(["train/pretrain.py", "--name", "b"], {"OMP_NUM_THREADS": "2"}, 2)
    assert convert == Command(["tools.convert", "my photos", "runs/x"])
    assert re.search(r"--train.epochs=1", " ".join(pretrain.small_arguments))
