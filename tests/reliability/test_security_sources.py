"""The product runs no code that comes with data, and starts no shell: by its sources."""

import pytest

from tests.reliability.source_rules import broken_rules, sources

EXCEPTIONS = {
    # Plain numbers and lists, between the ranks of one run that trust one another with their gradients.
    ("train/optim/zero.py", "a collective that unpickles"),
    # The published CIFAR files are pickles; its unpickler knows no class but NumPy's plain arrays, and no function.
    ("tools/source_cifar.py", "imports a module that unpickles"),
}

PLANTED = {
    "makes code from text": ["eval(text)", "exec(text)", "compile(text, 'a', 'exec')", "__import__(name)"],
    "imports a module that unpickles": [
        "import pickle",
        "from marshal import loads",
        "import dill as d",
        "import shelve",
    ],
    "torch.load without weights_only=True": [
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path, weights_only=False)",
        "import torch as t\nt.load(path, map_location='cpu', weights_only=flag)",
    ],
    "loads arrays with pickle": [
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "load(path, allow_pickle=some)",
    ],
    "yaml without a safe loader": [
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import full_load\nfull_load(text)",
        "import yaml\nyaml.unsafe_load(text)",
    ],
    "starts a shell": [
        "import subprocess\nsubprocess.run(line, shell=True)",
        "from subprocess import Popen\nPopen(line, shell=flag)",
        "import os\nos.system(line)",
        "from os import popen\npopen(line)",
        "import subprocess\nsubprocess.getoutput(line)",
    ],
    "names a temporary file without making it": [
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp\nmktemp()",
    ],
    "a collective that unpickles": [
        "import torch.distributed as dist\ndist.all_gather_object(out, thing)",
        "from torch.distributed import broadcast_object_list\nbroadcast_object_list(things)",
    ],
    "makes a file that all may write": ["path.chmod(0o666)", "import os\nos.umask(0)", "os.open(a, flags, 0o777)"],
}
FINE = """
import subprocess, yaml, torch, re, os
from pathlib import Path
import numpy as np
model.eval(); re.compile("a"); torch.load(path, weights_only=True); np.load(path); np.load(path, allow_pickle=False)
yaml.safe_load(text); yaml.load(text, yaml.SafeLoader); subprocess.run(["a", "b"]); subprocess.run(words, shell=False)
kernel.compile(); Path("a").chmod(0o644); os.umask(0o022); os.open(a, flags, 0o644); json.load(file)
"""


@pytest.mark.parametrize(("rule", "source"), [(rule, source) for rule in PLANTED for source in PLANTED[rule]])
def test_each_rule_finds_what_it_forbids(rule, source):
    assert [found for found, _ in broken_rules(source)] == [rule]


def test_no_rule_finds_what_is_fine():
    assert list(broken_rules(FINE)) == []


def test_the_product_breaks_no_rule():
    found = {(path, rule): line for path, source in sources() for rule, line in broken_rules(source)}
    assert len(dict(sources())) > 150
    assert {f"{path}:{line}: {rule}" for (path, rule), line in found.items() if (path, rule) not in EXCEPTIONS} == set()
    assert set(found) >= EXCEPTIONS, "an exception that is needed no more"
