"""A disk that fills up under a conversion: what was done is kept, and the same command goes on."""

import numpy as np
import pytest

from tests.reliability.file_systems import fill, tmpfs
from tests.tools.test_convert_shards import PAGE, RAW, SHARD
from tests.tools.ugly_images import picture, saved
from tools import convert_output
from tools.convert import convert_images
from tools.convert_places import Places

DISK_KIB = 40_000
ROOM = 9_500_000  # bytes: the tables' pages and some images
KINDS = {"one": ("x.beton", None), "shards": ("x.shards.json", SHARD)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up(tmp_path, monkeypatch, kind):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(16):
        pixels = np.roll(picture(500, 600), i, axis=1)
        (images / f"{i:02}.png").write_bytes(saved(pixels, "PNG", compress_level=1))
    monkeypatch.setattr(convert_output, "JOURNAL_SECONDS", 0.0)
    name, shard_size = KINDS[kind]

    def run(folder):
        places = Places(dest=folder / name, shard_size=shard_size, page_size=PAGE)
        return convert_images(images, places, RAW, workers=1)

    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole")
    with tmpfs(tmp_path / "disk", DISK_KIB) as disk:
        add, ballast = convert_output.Output.add, []

        def add_while_another_program_fills_it(output, index, result):
            if not ballast:
                ballast.append(fill(disk, leave=ROOM))
            add(output, index, result)

        with monkeypatch.context() as patch:
            patch.setattr(convert_output.Output, "add", add_while_another_program_fills_it)
            with pytest.raises(OSError, match=r"No space left on device|no folder has room") as caught:
                run(disk)
        assert "of 16 files; what was done is kept: put that right, and the same command goes on" in str(caught.value)
        assert (disk / f"{name}.journal").stat().st_size > 0
        ballast[0].unlink()
        told = run(disk)
        assert 0 < told.num_new < 16
        assert {path.name: path.read_bytes() for path in disk.iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
        }
