"""The command: what it prints and writes, and what it says of input that cannot be."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from tests.tools.plan_profiles import gpu_profile, profile, run_config, written
from tools.plan import main
from tools.plan_config import PlanConfig, parse_plan_config

ASKED = ["--global-batch-size", "4096", "--gpu-memory-gb", "80", "--price-per-gpu-hour", "2.5", "--hours", "10"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("profile"), gpu_profile())[0]


def test_it_prints_and_writes_one_plan(file, tmp_path, capsys):
    out, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    main(["--profile", file, *ASKED, "--gpus", "8,1,64", "--json", str(out), "--figure", str(figure)])
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    rows = {row["gpus"]: row for row in found["rows"]}
    assert list(rows) == [1, 8, 64]
    for gpus, row in rows.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [str(gpus)])
        assert line.split()[3] == f"{row['images_per_sec']:,.0f}"
        assert line.split()[4] == f"{row['efficiency']:.0%}"
        assert sum(row["parts_s"].values()) == pytest.approx(row["seconds_per_step"]) != 0
        assert row["images_per_sec"] == pytest.approx(4096 / row["seconds_per_step"])
    assert "does not fit" in next(line for line in text.splitlines() if line.split()[:1] == ["1"])
    assert found["scales_to"]["reason"] == "network"
    assert "why: the network" in text
    assert found["fits"] == 8
    assert "within 10 hours: 8 GPUs" in text
    for assumption in found["assumptions"]:
        assert assumption in text
    assert "1,600 Gbit/s and 3 µs a step; between machines 80 Gbit/s and 10 µs a step" in text
    with Image.open(figure) as image:
        assert image.size == (1950, 690)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_the_profile_may_lie_within_what_the_doctor_wrote(file, tmp_path, capsys):
    whole = tmp_path / "doctor.json"
    whole.write_text(json.dumps({"limiter": "decode", "profile": json.loads(Path(file).read_text())}))
    main(["--profile", file, "--gpus", "1"])
    alone = capsys.readouterr().out
    main(["--profile", str(whole), "--gpus", "1"])
    assert capsys.readouterr().out == alone
    assert "1,250 images/s on 1 × by hand" in alone


def test_a_cpus_plan_speaks_of_ranks(tmp_path, capsys):
    main(["--profile", *written(tmp_path, profile()), "--gpus", "1,2"])
    text = capsys.readouterr().out
    assert "ranks batch per rank images/s" in " ".join(text.split())
    assert "GPU" not in text


def test_unless_it_is_told_it_takes_the_gpus_that_divide_the_batch(tmp_path):
    out = tmp_path / "plan.json"
    main(["--profile", *written(tmp_path, profile(run=run_config(batch=24))), "--json", str(out)])
    assert [row["gpus"] for row in json.loads(out.read_text())["rows"]] == [1, 2, 4, 8]


def test_endless_bandwidth_is_written_as_json_knows_it(file, tmp_path):
    out = tmp_path / "plan.json"
    main(["--profile", file, "--gpus", "1", "--bandwidth-gbps", "inf", "--json", str(out)])
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert found["network"]["between"]["bytes_per_sec"] is None
    assert found["settings"]["bandwidth_gbps"] is None


def test_options_become_the_plan():
    words = "--profile a b --gpus 4,2 --selective-kernel --zero-stage 2 --precision fp32 --storage shared"
    assert parse_plan_config(words.split()) == PlanConfig(
        profile=("a", "b"), gpus=(2, 4), selective_kernel=True, zero_stage=2, precision="fp32", storage="shared"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 0", "`--gpus` must be numbers from 1"),
        ("--gpus 1,x", "argument --gpus: must be whole numbers such as 1,2,8, got '1,x'"),
        ("--json a.png --figure a.png", "must name different files, got a.png twice"),
        ("--depth fifty", "argument --depth: invalid int value: 'fifty'"),
        ("--zero-stage 3", "argument --zero-stage: invalid choice: 3"),
        ("--bandwidth-gbps 0", "`--bandwidth-gbps` must be a positive number, got 0.0"),
        ("--bandwidth-gbps nan", "`--bandwidth-gbps` must be a positive number, got nan"),
        ("--overlap 1.5", r"`--overlap` must be in \[0, 1\], got 1.5"),
        ("--min-efficiency 0", r"`--min-efficiency` must be in \(0, 1\], got 0.0"),
        ("--budget 100", "`--budget` needs `--price-per-gpu-hour`, got none"),
        ("--global-batch-size 8 --local-batch-size 8", "exclude each other, got both"),
        ("--figure plan.svg", r"`--figure` must be named \*.png, got plan.svg"),
        ("--hurry", "unrecognized arguments: --hurry"),
    ],
)
def test_bad_options_are_named(words, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_plan_config(["--profile", "a", *words.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"profile": 3}', "\udcff"])
def test_a_file_that_is_no_profile_is_named(tmp_path, content):
    bad = tmp_path / "bad.json"
    bad.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"must name tools.profile_throughput's JSON, got .*bad\.json") as error:
        main(["--profile", str(bad)])
    assert "\n" not in str(error.value)


def test_nothing_is_written_where_it_cannot_be(file, tmp_path):
    with pytest.raises(ValueError, match="must lie in a folder that exists"):
        main(["--profile", file, "--json", str(tmp_path / "nowhere" / "plan.json")])
    with pytest.raises(ValueError, match="must name a file, got a folder"):
        main(["--profile", file, "--json", str(tmp_path)])
    with pytest.raises(ValueError, match="`--width` must be one that"):
        main(["--profile", file, "--width", "1e9", "--json", str(tmp_path / "plan.json")])
    with pytest.raises(ValueError, match="`--gpus` must divide the global batch of 256 images, got 7; use 4"):
        main(["--profile", file, "--gpus", "7", "--json", str(tmp_path / "plan.json")])
    assert list(tmp_path.iterdir()) == []


def test_figures_are_finite(file, tmp_path):
    out = tmp_path / "plan.json"
    main(["--profile", file, "--local-batch-size", "64", "--size", "96", "--depth", "18", "--json", str(out)])
    found = json.loads(out.read_text())
    values = [value for row in found["rows"] for value in row["parts_s"].values()]
    assert all(math.isfinite(value) and value >= 0 for value in values)
