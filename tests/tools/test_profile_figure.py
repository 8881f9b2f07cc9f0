"""The picture and the table of a diagnosis: every stage with its rate, the limiter marked, the real rates as lines."""

import pytest
from PIL import Image

from tests.tools.hand_profiles import around, profile_of
from tests.tools.test_profile_advice import ON_GPU, PHOTOS, gpu
from tools.pictures_canvas import STYLE
from tools.profile_advice import diagnose
from tools.profile_figure import check_figure_path, draw, write_figure
from tools.profile_sweep import Cell
from tools.profile_table import diagnosis_text, sweep_text, verified_text
from tools.profile_verify import Trial, Verified


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def diagnosis(request):
    return diagnose(profile_of(PHOTOS) if request.param == "cpu" else gpu(), around())


def test_bars_end_at_the_stages_rates_on_a_logarithmic_axis(diagnosis):
    axes = draw(diagnosis).axes[0]
    assert axes.get_xscale() == "log"
    stages = diagnosis.profile.stages
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([stage.images_per_sec for stage in stages.values()])
    names = [label.get_text().removesuffix(" (GPU)") for label in axes.get_yticklabels()]
    assert names == list(stages)
    top, bottom = sorted(axes.get_ylim(), reverse=True)
    assert axes.get_ylim() == (top, bottom)  # storage is on top


def test_only_the_limiter_is_hatched_and_named(diagnosis):
    figure = draw(diagnosis)
    axes = figure.axes[0]
    hatched = [name for name, bar in zip(diagnosis.profile.stages, axes.patches, strict=True) if bar.get_hatch()]
    assert hatched == [diagnosis.limiter]
    assert [text.get_text() for text in axes.texts if "limits" in text.get_text()] == [
        f" {diagnosis.profile.stages[diagnosis.limiter].images_per_sec:,.0f}  ◀ limits"
    ]
    assert figure.get_suptitle() == f"{diagnosis.limiter} limits"


def test_the_real_rates_are_lines_that_are_told_apart_without_colour(diagnosis):
    profile = diagnosis.profile
    lines = draw(diagnosis).axes[0].lines
    rates = {profile.together_images_per_sec, profile.loading_images_per_sec, profile.training_images_per_sec}
    assert {line.get_xdata()[0] for line in lines} == rates
    assert len({line.get_linestyle() for line in lines}) == 3


def test_words_do_not_overlap_or_leave_the_picture(diagnosis):
    figure = draw(diagnosis)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_diagnosis_gives_the_same_file(diagnosis, tmp_path, ending):
    for name in ("one", "two"):
        write_figure(diagnosis, tmp_path / f"{name}.{ending}")
    first, second = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    if ending == "png":
        with Image.open(first) as image:
            assert image.size[0] == 1350
    assert STYLE["figure.facecolor"]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be named \*.png or \*.svg, got .*found.pdf"):
        check_figure_path(tmp_path / "found.pdf")


def test_the_table_has_a_line_for_each_stage_and_marks_one(diagnosis):
    lines = diagnosis_text(diagnosis).splitlines()
    for name, stage in diagnosis.profile.stages.items():
        line = next(line for line in lines if line.startswith(name))
        assert line.split()[1] == f"{stage.images_per_sec:,.0f}"
        assert ("◀ limits" in line) == (name == diagnosis.limiter)
    assert next(line for line in lines if line.startswith("storage_cold")).endswith("first epoch alone")
    assert any(line.startswith(f"limiter: {diagnosis.limiter}. ") for line in lines)
    for advice in diagnosis.advice:
        assert any(advice.words in line for line in lines)


def test_a_run_without_advice_says_so():
    rates = {name: ON_GPU[name] for name in ("photometric", "forward", "loss", "backward", "optimizer")}
    profile = profile_of(rates, device="cuda", gpu=("photometric",), num_samples=64)
    compiled = profile.config | {"train": profile.config["train"] | {"compile": "default"}}
    text = diagnosis_text(diagnose(type(profile)(**vars(profile) | {"config": compiled}), around(device_free=0)))
    assert "advice: none" in text


def test_the_verdict_is_what_was_measured():
    helped = Trial(
        change={"data.num_threads": 4},
        expected_images_per_sec=300.0,
        before=100.0,
        after=210.0,
        ratio=2.1,
        ratios=(2.0, 2.1, 2.2),
        kept=True,
    )
    in_vain = Trial(
        change={"train.precision": "bf16"}, expected_images_per_sec=150.0, before=100.0, after=99.0, ratio=0.99
    )
    in_vain = Trial(**vars(in_vain) | {"ratios": (0.9, 0.99, 1.2)})
    impossible = Trial(change={"data.loader": "dali"}, expected_images_per_sec=200.0, reason="no such package")
    text = verified_text(Verified(trials=(impossible, in_vain, helped)))
    assert "--data.loader dali: could not be measured (no such package)" in text
    assert "--train.precision bf16: 100 → 99 images/s, 0.99× (0.90 to 1.20 in 3 rounds); expected 150" in text
    assert text.endswith("verdict: --data.num_threads 4 helps here, 2.10×: keep it.")
    assert "keep the configuration as it is" in verified_text(Verified(trials=(in_vain,)))
    assert Verified(trials=(impossible, in_vain)).to_json()["change"] == {"train.precision": "bf16"}
    assert Verified(wanted=False).to_json() | {"trials": []} == {
        "change": {},
        "expected_images_per_sec": None,
        "before": None,
        "after": None,
        "ratio": None,
        "ratios": (),
        "kept": False,
        "reason": "not asked for",
        "trials": [],
    }


def test_the_sweep_s_table_marks_the_best_and_keeps_reasons():
    common = {"num_threads": 4, "global_batch_size": 64}
    cells = [
        Cell(loader="ffcv", is_now=True, images_per_sec=900.0, data_wait=0.25, **common),
        Cell(loader="dali", is_now=False, reason="no such package", **common),
        Cell(loader="resident", is_now=False, images_per_sec=1200.0, data_wait=0.0, **common),
    ]
    lines = sweep_text(cells).splitlines()
    assert lines[1].split() == ["ffcv", "4", "64", "900", "25%", "now"]
    assert lines[2].split(maxsplit=3) == ["dali", "4", "64", "no such package"]
    assert lines[3].split() == ["resident", "4", "64", "1,200", "0%", "◀", "best"]
