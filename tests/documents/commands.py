"""The commands of a document's bash blocks, and how each is started on a small set.

A launcher's ranks are forked, two at most. What would make a command run for hours is overridden by options behind its
own, which are parsed all the same. Most networks keep the depth and the width that the document gives them.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train/pretrain.py", "train/evaluate.py")
LAUNCHERS = ("python", "deepspeed", "torchrun")
DATE = "2026-01-01"
"""What `$(date +%F)` gives."""

SMALL_RUN = [
    "--augment.size=16",
    "--augment.crop_area=[0.3,1.0]",
    "--model.encoder.stem=imagenet",
    "--model.projection_head.hidden_dim=32",
    "--model.projection_head.out_dim=16",
    "--data.global_batch_size=16",
    "--data.num_threads=1",
    "--schedule.warmup_epochs=0",
    "--train.epochs=1",
    "--train.precision=fp32",
    "--train.cpu_threads=1",
    "--train.device=cpu",
]
SMALL_PROFILE = [
    *SMALL_RUN,
    "--data.global_batch_size=64",
    "--model.encoder.depth=10",
    "--model.encoder.width=0.25",
    "--seconds=0.05",
]
SMALL_TRAINING = ["--global_batch_size=16", "--epochs=1"]
SMALL = {
    "train/pretrain.py": SMALL_RUN,
    "train/evaluate.py finetune": SMALL_TRAINING,
    "train/evaluate.py supervised": SMALL_TRAINING,
    "train/evaluate.py distill": SMALL_TRAINING,
    "train/evaluate.py linear": ["--epochs=1", "--batch_size=32"],
    "tools.profile_throughput": SMALL_PROFILE,
    "tools.study temperature": [*SMALL_RUN, "--rows=0.1"],
    "tools.study head": [*SMALL_RUN, "--columns=32"],
    "tools.study composition": [*SMALL_RUN, "--rows=crop; color"],
}
"""Options that follow those of the document, by program and subcommand."""
SMALL_WHERE_GIVEN = {
    "--config=configs/imagenet_r50_simclr.yaml": ["--model.encoder.depth=18"],
    "--config=configs/imagenet_r152_3x_sk_simclr_v2.yaml": ["--model.encoder.depth=50", "--model.encoder.width=0.25"],
    "--labels.fraction=0.01": ["--labels.fraction=0.1"],
    "--log.mlflow_uri=http://tracking.example:5000": ["--log.mlflow_uri=mlruns"],
    "--mode=finetune": ["--global_batch_size=32", "--learning_rates=[0.1]", "--weight_decays=[0.0]", "--steps=1"],
    "--schedule.sizes=[[0,160],[60,192],[80,224]]": ["--schedule.sizes=[[0,16]]"],
    "--start=4000": ["--start=40"],
    "--train.micro_batch_size=256": ["--train.micro_batch_size=8"],
    "--train.micro_batch_size=32": ["--train.micro_batch_size=8"],
}
"""Options that follow one of the document, by that one."""


@dataclass(frozen=True)
class Command:
    """One command, as the document has it."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment, set in front of it."""
    num_ranks: int = 1

    @property
    def program(self):
        """`train/pretrain.py`, `train/evaluate.py`, `tools.convert`, …; or a program that is not ours."""
        return self.words[0]

    @property
    def arguments(self):
        return self.words[1:]

    @property
    def is_ours(self):
        return self.program in SCRIPTS or self.program.startswith(("tools.", "benchmarks."))

    def value_of(self, option):
        """What an option is given; None if it is not there."""
        for i, word in enumerate(self.arguments):
            name, equals, value = word.partition("=")
            if name == option:
                return value if equals else self.arguments[i + 1]
        return None

    @property
    def small_arguments(self):
        """With what makes it small behind them."""
        subcommand = f"{self.program} {self.arguments[0]}" if self.arguments else ""
        small = [*SMALL.get(self.program, SMALL.get(subcommand, []))]
        for given, instead in SMALL_WHERE_GIVEN.items():
            option, _, value = given.partition("=")
            small += instead if self.value_of(option) == value else []
        return [*self.arguments, *small]


def commands_of(document):
    """Every command of the bash blocks, in order; assignments are put in where their names stand."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    found, assigned = [], {}
    for line in "\n".join(blocks).replace("\\\n", " ").replace("$(date +%F)", DATE).splitlines():
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: assigned.get(name[1], name[0]), line), comments=True)
        if len(words) == 1 and re.fullmatch(r"\w+=.*", words[0]):
            name, _, value = words[0].partition("=")
            assigned[name] = value
        elif words:
            found.append(_command(words))
    return found


def _command(words):
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] not in LAUNCHERS:
        return Command(words, variables)
    num_ranks = 1
    for i, word in enumerate(words):
        option, _, value = word.partition("=")
        if option in ("--num_gpus", "--nproc_per_node"):
            num_ranks = min(2, int(value or words[i + 1]))
        if word in SCRIPTS:
            return Command(words[i:], variables, num_ranks)
        if words[i - 1] in ("-m", "--module") and word != "pytest":
            return Command(words[i:], variables, num_ranks)
    return Command(words, variables)
