"""The documents against the code: paths, links, options, configurations and the module list."""

import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from train.config import config_from_dict, parse_pretrain_config, resolved_dict
from train.evaluation.protocol import PROTOCOLS
from train.optim.lars import peak_lr

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("native", "pipelines", "model", "train", "tools", "benchmarks")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
SCRIPTS = {"train/pretrain.py": "train.pretrain", "train/evaluate.py": "train.evaluate"}
SUBCOMMANDS = {"train.evaluate", "tools.pictures"}
TOOLS = ("convert", "verify", "inspect_beton", "preview", "export", "extract", "import_checkpoint", "study")
TOOLS += ("profile_throughput", "plan", "report")
OPTION = r"(?<![\w*-])--[\w.-]*\w"
FOREIGN_OPTIONS = {"--num_gpus", "--nproc_per_node", "--local_rank", "--bench-json"}
FOREIGN_OPTIONS |= {"--hostfile", "--nnodes", "--time", "--signal", "--gpus", "--ipc"}
"""Of launchers, Slurm, Docker and pytest, where a sentence names them."""

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fenced(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def prose(document):
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(document):
    """The words of every command in the document's bash blocks."""
    lines = "\n".join(fenced(document, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def of_ours(words):
    """The module that a command starts and its arguments, or None if it starts none of ours."""
    for i, word in enumerate(words):
        if word in SCRIPTS:
            return SCRIPTS[word], words[i + 1 :]
        if words[i - 1] == "-m" and word.startswith("tools."):
            return word, words[i + 1 :]
    return None


@cache
def options(module, subcommand=None):
    """Every option that a command's `--help` lists."""
    main = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", [module, *([subcommand] if subcommand else []), "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
    return frozenset(re.findall(OPTION, out.getvalue()))


@documents
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        assert re.match(r"https?://", target) or (document.parent / target).exists(), target


@documents
def test_every_path_exists(document):
    text, folders = document.read_text(), "|".join((*PACKAGES, "tests", "configs", "docs", r"\.ci"))
    added = set(re.findall(r"^`([\w/.]+\.py)`:\n\n```python$", text, re.MULTILINE))  # the guide's own files
    for path in set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./:-]*\w", text)) - added:
        file, *names = path.split("::")
        assert (ROOT / file).exists(), path
        for name in names:
            assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), path


@documents
def test_every_command_has_the_options_that_it_is_given(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(document):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        if started := of_ours(words):
            module, arguments = started
            subcommand = arguments[0] if module in SUBCOMMANDS else None
            given = {argument for argument in arguments if argument.startswith("--")}
            assert given <= options(module, subcommand), words
            if module == "train.pretrain":
                parse_pretrain_config(arguments)  # the values as well


@documents
def test_every_option_and_field_in_a_sentence_exists(document):
    pretrain = options("train.pretrain")
    known = pretrain.union(*(options("train.evaluate", protocol) for protocol in PROTOCOLS))
    known = known.union(*(options(f"tools.{tool}") for tool in TOOLS))
    for span in re.findall(r"`([^`]+)`", prose(document)):
        assert set(re.findall(OPTION, span)) <= known | FOREIGN_OPTIONS, span
        field = re.match(r"(?:data|augment|model|optim|schedule|train|online|log)(?:\.[a-z_]+)+(?=$|:)", span)
        if field and not (ROOT / field[0].replace(".", "/")).with_suffix(".py").exists():
            assert f"--{field[0]}" in pretrain, span


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses_and_is_named_in_the_readme(path):
    config = parse_pretrain_config(["--config", str(path)])
    assert config_from_dict(resolved_dict(config)) == config
    assert f"configs/{path.name}" in (ROOT / "README.md").read_text()


def test_the_published_recipes_reach_the_published_rates():
    for name, rate in (("cifar10_simclr", 2.0), ("imagenet_r50_simclr", 4.8)):
        config = parse_pretrain_config(["--config", str(ROOT / f"configs/{name}.yaml")])
        assert peak_lr(config.optim, config.data.global_batch_size) == pytest.approx(rate)


def test_the_architecture_names_every_module_and_no_other():
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(rf"^\| `((?:{'|'.join(PACKAGES)})/[\w/]+\.py)` \|", text, re.MULTILINE)
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in files)


def test_every_decision_has_a_number_of_its_own_and_three_parts():
    pages = sorted(ROOT.glob("docs/adr/*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert re.findall(r"^## (.*)", page.read_text(), re.MULTILINE) == ["Context", "Decision", "Consequences"], page
        assert page.read_text().startswith(f"# {page.name[:4]}. ")
