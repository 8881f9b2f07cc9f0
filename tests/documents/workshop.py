"""A folder in which the documents' commands find what they name: images, `.beton` files, runs, lists.

What a command names and no earlier one has made is put there before it starts: small images of two classes, or a run
that was trained for a moment on them.
"""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import torch
import torchvision

from tests.documents.commands import ROOT, SMALL_RUN
from tests.reliability.forked import Forked, variables_of
from train.runtime import free_port

CLASSES = ("cats", "dogs")
NUM_IMAGES = {"train": 120, "test": 20}
"""Of each class: as many as 200 nearest neighbours need."""
PROFILES = {"one.json": 1, "eight.json": 8}
"""Ranks, by the name of a profile."""
RESULTS = ("before.json", "after.json", "docs/results/")
"""What results of races are called."""
TRAINED = [
    "--model.encoder.depth=18",
    "--model.projection_head.num_layers=3",
    "--train.ema_decay=0.9",
]
"""Of runs that are there from the start: whatever a document may ask for."""


class Workshop:
    """The folder of one document.

    Args:
        folder: where to work; empty.
        template: as `make_template` leaves it.
    """

    def __init__(self, folder, template):
        self.folder, self.template = folder, template
        self._provided = set()
        self._num_started = 0
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / "data").mkdir()

    def start(self, command):
        """Provide what it names and run it; returns (exit codes, what rank 0 printed)."""
        words = [self._local(word) for word in (command.program, *command.small_arguments)]
        made = self._made_by(command)
        for path in made:
            if path in self._provided or command.program == "tools.convert":  # a guide shows several ways to one file
                self._provided.discard(path)
                self._remove(path)
        for word in [*words[1:], *_paths_in_config(command)]:
            self._provide(word.partition("=")[2] or word, made)
        self._num_started += 1
        variables = {"WANDB_MODE": "offline"} | command.variables
        return start(words, self.folder, f"output-{self._num_started}", variables, command.num_ranks)

    def _local(self, word):
        """Paths of other machines lie below the workshop; `…` stands for the run that an evaluation has trained."""
        if word.endswith("/…"):
            return (
                next(self.folder.glob(f"{word[:-1]}finetune*/config.yaml")).parent.relative_to(self.folder).as_posix()
            )
        return re.sub(r"^/(?=(?:local|shared)/)", "", word)

    def _made_by(self, command):
        """Paths that a command is there to make."""
        if command.program == "tools.convert":
            return {word for word in command.arguments if word.endswith((".beton", ".shards.json"))}
        if command.program == "train/pretrain.py":
            name = command.value_of("--name")
            if name is None and (config := command.value_of("--config")):
                name = re.search(r"^name: (\S+)", (ROOT / config).read_text(), re.MULTILINE)[1]
            return {f"{self._local(command.value_of('--runs_dir') or 'runs')}/{name}"}
        out = command.value_of("--out")
        return {out} if out else set()

    def _provide(self, word, made):
        path = self.folder / word
        if path.exists() or word in made or not re.fullmatch(r"[\w./-]+", word) or word.startswith(("-", "/")):
            return
        if match := re.match(r"runs/[\w-]+", word):
            word = match[0]
            shutil.copytree(self.template / "runs/template", self.folder / word, dirs_exist_ok=True)
        elif not (self._provide_images(word, path) or self._provide_file(word, path)):
            return
        self._provided.add(word)

    def _provide_images(self, word, path):
        """A `.beton` or a folder; returns whether the word names one."""
        split = "test" if re.search("test|val", word) else "train"
        if word.endswith(".beton"):
            for suffix in ("", ".json"):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.template / f"{split}.beton{suffix}", f"{path}{suffix}")
        elif re.fullmatch(r"\w+/(?:train|test|val)", word):
            shutil.copytree(self.template / split, path)
        elif word == "photos":
            for split in NUM_IMAGES:
                shutil.copytree(self.template / split, path / split)
        else:
            return False
        return True

    def _provide_file(self, word, path):
        """A list of images, somebody's weights, a profile or a result; returns whether the word names one."""
        if word == "resnet50.pth":
            torch.save(torchvision.models.resnet50().state_dict(), path)
            return True
        if word.endswith(".txt"):
            text = "\n".join(file.relative_to(self.template / "train").as_posix() for file in self._images()[::10])
        elif word in PROFILES:
            text = json.dumps(profile_of(PROFILES[word]))
        elif word.startswith(RESULTS):
            text = next((ROOT / "docs/results").glob("*-pipelines-cpu.json")).read_text()
        elif word == "README.md":
            text = (ROOT / word).read_text()
        else:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return True

    def _images(self):
        return sorted((self.template / "train").rglob("*.jpg"))

    def _remove(self, word):
        path = self.folder / word
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            Path(f"{path}.json").unlink(missing_ok=True)


def _paths_in_config(command):
    """The data that a configuration names."""
    config = command.value_of("--config")
    return re.findall(r"\S+\.beton", (ROOT / config).read_text()) if config and (ROOT / config).exists() else []


def make_template(folder):
    """Two splits as folders and as `.beton` files, and a run."""
    # Not above: the processes that run the commands import this module, and should come to theirs fresh.
    from tests.pipelines.betons import natural_image
    from tools.convert import convert
    from tools.image_encoding import EncodeOptions

    for split, count in NUM_IMAGES.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                natural_image(24, 20, 2 * i + label).save(folder / split / name / f"{i:04d}.jpg")
        convert(folder / split, folder / f"{split}.beton", EncodeOptions(), workers=1)
    (folder / "configs").symlink_to(ROOT / "configs")
    words = ["train/pretrain.py", "--name=template", "--data.path=train.beton", *SMALL_RUN, *TRAINED]
    codes, told = start(words, folder, "output")
    assert codes == [0], told


def profile_of(ranks):
    """A profile of so many ranks, as JSON."""
    from tests.tools.plan_profiles import profile

    return profile(ranks=ranks).to_json()


def start(words, folder, output, variables=None, num_ranks=1):
    """Run one of our programs in `folder`, by forked ranks; returns (exit codes, what rank 0 printed)."""
    port, ranks = free_port(), []
    for rank in range(num_ranks):
        told = variables_of(rank, num_ranks, port) if num_ranks > 1 else {}
        ranks.append(Forked(folder / f"{output}-{rank}", told | (variables or {}), _run, str(folder), words))
    try:
        return [rank.end() for rank in ranks], ranks[0].text()
    finally:
        for rank in ranks:
            rank.kill()


def _run(folder, words):
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    if words[0].endswith(".py"):
        sys.argv = [str(ROOT / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
