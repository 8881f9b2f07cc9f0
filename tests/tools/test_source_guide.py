"""Every command of the guide on formats, run on small data that lie where it says."""

import json
import shlex
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest
from tests.tools.source_files import CLASSES, heic, photos, write_tar
from tests.tools.torchvision_files import cifar_files, stl_files, write, write_archive
from tests.tools.ugly_images import picture
from tools import convert

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "formats.md"
COMMANDS = [shlex.split(line) for line in GUIDE.read_text().splitlines() if line.startswith("python -m tools.convert ")]
# Images and classes that each should give, in the guide's order.
EXPECTED = [
    (7, CLASSES),
    (3, None),
    (7, ["0", "1", "2"]),
    (7, ["0", "1", "2"]),
    (7, CLASSES),
    (5, CLASSES),
    (7, CLASSES),
    (2, CLASSES),
    (20, "airplane"),
    (4, "airplane"),
    (4, None),
    (7, CLASSES),
    (7, CLASSES),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the sources of all commands."""
    root = tmp_path_factory.mktemp("guide")
    samples = photos()
    for name in ("phone/2024", "shards", "tables", "hub/pets/data", "lists/images", "torchvision", "hf"):
        (root / name).mkdir(parents=True)
    for i, (data, label) in enumerate(samples):
        (root / "photos" / "train" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (root / "photos" / "train" / CLASSES[label] / f"{i}.jpg").write_bytes(data)
        (root / "lists" / "images" / f"{i}.jpg").write_bytes(data)
    (root / "phone" / "IMG_1.heic").write_bytes(heic(picture(48, 80)))
    (root / "phone" / "IMG_2.jpg").write_bytes(samples[0][0])
    (root / "phone" / "2024" / "IMG_3.jpg").write_bytes(samples[1][0])
    (root / "phone" / "IMG_1.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    for shard, part in enumerate((samples[:4], samples[4:])):
        members = {}
        for i, (data, label) in enumerate(part):
            members |= {f"{i}.jpg": data, f"{i}.cls": b"%d" % label}
            members |= {f"{i}.json": json.dumps({"word": CLASSES[label]}).encode()}
        write_tar(root / "shards" / f"train-{shard:03d}.tar", members)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    content = {"image": [{"bytes": d, "path": None} for d, _ in samples], "label": [c for _, c in samples]}
    table = datasets.Dataset.from_dict(content, features=features)
    parts = {"train": table.select(range(5)), "test": table.select([5, 6])}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(root / "hf" / "pets")
    for name, part in parts.items():
        part.to_parquet(root / "hub" / "pets" / "data" / f"{name}-00000-of-00001.parquet")
    breeds = {"image": [data for data, _ in samples], "breed": [CLASSES[label] for _, label in samples]}
    pyarrow.parquet.write_table(pyarrow.table(breeds), root / "tables" / "pets.parquet")
    cifar = cifar_files("cifar-10-batches-py")
    write_archive(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar)
    write(root / "torchvision" / "cifar-10-batches-py", cifar)
    write(root / "stl10_binary", stl_files())
    listed = [(f"images/{i}.jpg", CLASSES[label]) for i, (_, label) in enumerate(samples)]
    (root / "lists" / "train.csv").write_text("path,label\n" + "".join(f"{path},{word}\n" for path, word in listed))
    lines = (json.dumps({"picture": path, "species": word}) + "\n" for path, word in listed)
    (root / "lists" / "train.jsonl").write_text("".join(lines))
    return root


@pytest.mark.parametrize(("command", "expected"), list(zip(COMMANDS, EXPECTED, strict=True)))
def test_commands_of_the_guide(place, tmp_path, monkeypatch, command, expected):
    num_images, classes = expected
    monkeypatch.chdir(place)
    dest = tmp_path / Path(command[4]).name
    monkeypatch.setattr("sys.argv", ["convert", command[3], str(dest), *command[5:], "--workers", "2"])
    assert convert.main() == 0
    manifest = load_manifest(dest)
    assert len(open_beton(dest).modes) == manifest.num_samples == num_images
    assert manifest.classes == classes or manifest.classes[0] == classes
    film = ["is not an image of a known format, but a QuickTime video (.mov)"]
    assert [entry.reason for entry in manifest.quarantined] == (film if "phone" in command[3] else [])
