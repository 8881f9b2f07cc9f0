"""The guides that change the code: their files and differences go into a copy of the repository, and that one runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.documents.commands import ROOT
from tests.pipelines.betons import make_beton
from tests.train.runs import TINY, environment

PACKAGES = ("native", "pipelines", "model", "train", "tools", "tests")


def copy_of(tmp_path, guide):
    """The packages, changed as the guide says."""
    copy = tmp_path / "copy"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    text = (ROOT / "docs/guides" / guide).read_text()
    for path, source in re.findall(r"^`([\w/.]+\.py)`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert not (copy / path).exists()
        (copy / path).write_text(source)
    for difference in re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        result = subprocess.run(
            ["git", "apply", "-p1", "-"],
            cwd=copy,
            input=difference,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    return copy


def run(copy, *arguments):
    """What Python prints in a copy."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=copy, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def losses(copy, data, runs_dir, *options, launcher=()):
    arguments = [*launcher, "train/pretrain.py", "--name=run", f"--runs_dir={runs_dir}", f"--data.path={data}"]
    run(copy, *arguments, *TINY, "--train.epochs=2", *options)
    return [json.loads(line)["loss"] for line in (runs_dir / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("guide", "file", "name"),
    [
        ("adding_a_method.md", "model/build.py", "barlow_twins"),
        ("adding_an_augmentation.md", "pipelines/photometric/triton_kernels.py", "adjust_gamma"),
    ],
)
def test_the_guides_apply_to_the_code_as_it_is(tmp_path, guide, file, name):
    copy = copy_of(tmp_path, guide)
    assert name in (copy / file).read_text()


@pytest.mark.slow
def test_the_method_of_the_guide_trains_alike_on_one_rank_and_two(tmp_path):
    copy = copy_of(tmp_path, "adding_a_method.md")
    (tmp_path / "set").mkdir()
    data = make_beton(tmp_path / "set", [(24, 20)] * 64).path
    one = losses(copy, data, tmp_path / "one", "--model.method=barlow_twins")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = losses(copy, data, tmp_path / "two", "--model.method=barlow_twins", launcher=launcher)
    assert one == pytest.approx(two, rel=1e-3)
    assert one[-1] < one[0]


VIEWS = """
import hashlib
import numpy as np
import torch
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.photometric.chain import photometric_chain
from tests.pipelines import triton_interpreter
from tests.pipelines.draws import draw
from tests.pipelines.triton_inputs import random_crops

figure_5 = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")
digest = lambda array: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
for name, options in (("byol", {}), ("one_branch", {"branch_transformations": figure_5})):
    recipe = build_recipe(AugmentConfig(recipe=name, size=40, **options))
    params = draw(recipe, 2000)
    print(name, *(digest(params[field]) for field in params.dtype.names if field != "gamma"))
    for v, view in enumerate(recipe.views):
        some, crops = params[:16, v].copy(), random_crops(16, 40)
        for backend in ("reference", "numba"):
            print(backend, digest(photometric_chain(crops, some, view, recipe, backend=backend)))
        print("triton", digest(triton_interpreter.photometric(crops, some, view, recipe, torch.bfloat16)))
"""


@pytest.mark.slow
def test_views_without_the_operation_of_the_guide_keep_their_bits(tmp_path):
    before, after = run(ROOT, "-c", VIEWS), run(copy_of(tmp_path, "adding_an_augmentation.md"), "-c", VIEWS)
    assert len(before.splitlines()) == 14  # of each recipe the draws, and two views by three backends
    assert before == after


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        ("test_gamma",),
        ("test_params", "test_augment", "test_augment_draws", "test_augment_operations", "test_extra_transformations"),
        ("test_photometric",),
        ("test_photometric_triton",),
    ],
    ids=lambda files: files[0],
)
def test_the_operation_of_the_guide_passes_its_tests_and_those_that_were_there(tmp_path, files):
    copy = copy_of(tmp_path, "adding_an_augmentation.md")
    paths = [f"tests/pipelines/{file}.py" for file in files]
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths)
