"""The contact sheet: the very views of training, their parameters in words, as a picture and as a page."""

import base64
import io
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.draw import draw_views
from pipelines.ffcv_loader import FFCVLoader
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION, VIEW_PARAMS
from pipelines.recipe import ViewRecipe
from tests.pipelines.betons import make_beton, natural_image
from tests.train.runs import ROOT, environment
from tools.convert import convert
from tools.image_encoding import EncodeOptions
from tools.preview import PreviewConfig, make_sheet, parse_config, write_preview
from tools.preview_sheet import GAP, LINE, MARGIN, Shown, color_of, original_with_windows
from tools.preview_words import describe

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(12)]
NORMALISED = AugmentConfig(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def beton(request, tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("set"), SIZES, encode=request.param)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("jpegs"), SIZES)


def picture_in(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def sheet_of(source, **options):
    return make_sheet(PreviewConfig(**{"source": str(source), "out": "x.png", "augment": NORMALISED} | options))


def params_of(**values):
    params = np.zeros((), VIEW_PARAMS)
    params["jitter_order"], params["solarize_threshold"] = NO_OP, np.inf
    params["top"], params["left"], params["height"], params["width"] = 34, 122, 190, 240
    for name, value in values.items():
        params[name] = value
    return params[()]


def factors(**named):
    order = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
    values = [1.0, 1.0, 1.0, 0.0]
    for name, value in named.items():
        values[order[name]] = value
    return values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ["nothing else"]),
        ({"flip": True, "gray": True}, ["mirrored", "gray"]),
        (
            {"jitter_order": (HUE, CONTRAST, BRIGHTNESS, SATURATION), "jitter_factor": factors(contrast=1.5, hue=-0.1)},
            ["hue −36° → contrast ×1.50 → brightness ×1.00 → saturation ×1.00"],
        ),
        (
            {"jitter_order": (NO_OP, HUE, NO_OP, BRIGHTNESS), "jitter_factor": factors(brightness=0.4, hue=0.2)},
            ["hue +72° → brightness ×0.40"],
        ),
        ({"blur_sigma": 1.234}, ["blur σ 1.23 px, kernel 23"]),
        ({"solarize_threshold": 0.5}, ["solarized from 0.50"]),
        ({"quarter_turns": 1}, ["turned 90° left"]),  # counter-clockwise
        ({"quarter_turns": 3, "sobel": True}, ["turned 90° right", "Sobel edges"]),
        ({"noise_std": 0.111, "cutout_height": 88, "cutout_width": 112, "cutout_left": 7},
         ["noise σ 0.111", "cutout 112 × 88 at (7, 0)"]),
    ],
)  # fmt: skip
def test_parameters_are_told_in_the_order_of_their_application(values, expected):
    said = describe(params_of(**values), ViewRecipe(size=224))
    assert said == ["window 240 × 190 at (122, 34)", *expected]


def test_views_are_those_of_a_training_run(beton):
    # Whatever batch and position the row has there.
    sheet = sheet_of(beton.path, images=12, epoch=3, seed=7)
    recipe = build_recipe(NORMALISED)
    loader = FFCVLoader(beton, recipe, seed=7, global_batch_size=6, num_threads=2)
    try:
        batches = list(loader.epoch(3))
    finally:
        loader.close()
    mean, std = np.array(recipe.mean), np.array(recipe.std)
    for batch in batches:
        for i, row in enumerate(batch.sample_indices.tolist()):
            for ours, view in zip(sheet.images[row].views, batch.views, strict=True):
                seen = (view[i].permute(1, 2, 0).double().numpy() * std + mean) * 255
                assert np.abs(ours - seen.clip(0, 255)).max() < 0.501


def test_parameters_and_originals_are_those_of_the_row(beton):
    sheet = sheet_of(beton.path, images=3, start=4, epoch=3, seed=7)
    rows = np.arange(4, 7)
    expected = draw_views(build_recipe(NORMALISED), 7, 3, rows, beton.widths[rows], beton.heights[rows])
    assert [image.row for image in sheet.images] == rows.tolist()
    assert [image.name for image in sheet.images] == ["class0/0004.png", "class0/0005.png", "class1/0006.png"]
    for image, params in zip(sheet.images, expected, strict=True):
        assert (image.params == params).all()
        width, height = SIZES[image.row]
        picture = np.asarray(natural_image(width, height, image.row)).astype(float)
        assert np.abs(image.original - picture).mean() < 12  # JPEG's loss


def test_a_file_without_a_manifest_is_shown_without_names(jpegs, tmp_path):
    (tmp_path / "set.beton").write_bytes(jpegs.path.read_bytes())
    for manifest in (None, "{"):
        if manifest:
            (tmp_path / "set.beton.json").write_text(manifest)
        assert [image.name for image in sheet_of(tmp_path / "set.beton", images=2).images] == ["", ""]


@pytest.mark.parametrize(("start", "images"), [(0, 5), (5, 4), (7, 5), (10, 8), (11, 1)])
def test_any_rows_may_be_asked_for(jpegs, start, images):
    whole, part = sheet_of(jpegs.path, images=12).images, sheet_of(jpegs.path, start=start, images=images).images
    assert [image.row for image in part] == list(range(12))[start : start + images]
    for image in part:
        for ours, theirs in zip(image.views, whole[image.row].views, strict=True):
            assert (ours == theirs).all()


def test_a_folder_and_its_beton_look_alike(tmp_path):
    for i, (width, height) in enumerate(SIZES[:4]):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        natural_image(width, height, i).save(tmp_path / "photos" / "a" / f"{i}.jpg", quality=90)
    convert(tmp_path / "photos", tmp_path / "set.beton", EncodeOptions(encode="keep"), workers=1)
    supervised = AugmentConfig(recipe="supervised", size=48)
    folder, beton = (sheet_of(tmp_path / name, augment=supervised).images for name in ("photos", "set.beton"))
    for ours, theirs in zip(folder, beton, strict=True):
        assert (ours.row, ours.name) == (theirs.row, theirs.name)
        assert (ours.params == theirs.params).all()
        assert (ours.original == theirs.original).all()
        assert np.abs(ours.views[0].astype(int) - theirs.views[0]).max() <= 1


def test_windows_are_drawn_where_they_are():
    original = np.full((100, 200, 3), 128, np.uint8)
    params = np.array(
        [params_of(top=10, left=20, height=40, width=60), params_of(top=0, left=0, height=100, width=200)]
    )
    image = Shown(row=0, name="", original=original, params=params, views=[])
    picture = np.asarray(original_with_windows(image, 400)).astype(int)
    assert picture.shape == (200, 400, 3)
    first, second = (np.array(ImageColor.getrgb(color_of(v))) for v in (0, 1))
    for y, x in ((21, 41), (21, 158), (98, 41), (98, 158), (21, 100), (60, 41)):
        assert (picture[y, x] == first).all()
    for y, x in ((1, 1), (1, 398), (198, 1), (198, 398)):
        assert (picture[y, x] == second).all()
    assert (picture[60, 100] == 128).all()
    assert (picture[120, 300] == 128).all()


def test_equal_windows_lie_inside_one_another():
    image = Shown(row=0, name="", original=np.zeros((50, 50, 3), np.uint8), params=np.array([params_of(
        top=0, left=0, height=50, width=50)] * 2), views=[])  # fmt: skip
    picture = np.asarray(original_with_windows(image, 100))
    assert (picture[50, 1] == ImageColor.getrgb(color_of(0))).all()
    assert (picture[50, 5] == ImageColor.getrgb(color_of(1))).all()


def test_the_picture_holds_the_views_pixel_by_pixel(jpegs, tmp_path):
    path = write_preview(
        PreviewConfig(source=str(jpegs.path), out=str(tmp_path / "a.png"), augment=NORMALISED, images=2)
    )
    picture = picture_in(path)
    cell, enlarged = 224, 7  # 224 // 32
    for v, view in enumerate(sheet_of(jpegs.path, images=1).images[0].views):
        x, y = MARGIN + (v + 1) * (cell + GAP), MARGIN + 4 * LINE
        shown = picture[y : y + cell, x : x + cell]
        assert (shown == view.repeat(enlarged, 0).repeat(enlarged, 1)).all()
    assert (picture[-1, -1] == 255).all()


@pytest.mark.parametrize(("size", "side"), [(1, 224), (96, 192), (224, 224), (300, 300), (500, 384)])
def test_views_of_any_size_have_room(jpegs, tmp_path, size, side):
    augment = AugmentConfig(recipe="supervised", size=size)
    out = tmp_path / "a.png"
    write_preview(PreviewConfig(source=str(jpegs.path), out=str(out), augment=augment, images=1))
    cell = max(224, side)
    assert picture_in(out).shape[1] == 2 * MARGIN + 2 * cell + GAP


def test_many_views_go_on_in_the_next_line(jpegs, tmp_path):
    augment = AugmentConfig(recipe="dino", size=64, local_size=32)
    out = tmp_path / "a.png"
    write_preview(PreviewConfig(source=str(jpegs.path), out=str(out), augment=augment, images=1))
    height, width, _ = picture_in(out).shape
    assert width == 2 * MARGIN + 6 * 224 + 5 * GAP
    assert height > 2 * 224


class Page(HTMLParser):
    """The images, headings and list items of a page."""

    def __init__(self):
        super().__init__()
        self.images, self.tags, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)


def test_the_page_stands_alone_and_says_what_it_shows(jpegs, tmp_path):
    write_preview(PreviewConfig(source=str(jpegs.path), out=str(tmp_path / "a.html"), augment=NORMALISED, images=2))
    text = (tmp_path / "a.html").read_text()
    page = Page()
    page.feed(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert '<html lang="en">' in text
    assert page.tags.count("h1") == 1
    assert len(page.images) == 2 * 3
    sheet = sheet_of(jpegs.path, images=2)
    for i, image in enumerate(sheet.images):
        stored, *views = page.images[3 * i : 3 * i + 3]
        assert image.name in stored["alt"]
        for v, view in enumerate(views):
            said = describe(image.params[v], sheet.recipe.views[v])
            assert view["alt"] == f"view {v + 1} of row {i}: {'; '.join(said)}"
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(view["src"].partition(",")[2]))))
            assert (pixels == image.views[v]).all()


def test_names_are_escaped(tmp_path):
    (tmp_path / "photos").mkdir()
    natural_image(20, 20, 0).save(tmp_path / "photos" / "<b>&'\".jpg")
    out = tmp_path / "a.html"
    write_preview(PreviewConfig(source=str(tmp_path / "photos"), out=str(out), augment=AugmentConfig(size=16)))
    assert "<b>&'" not in out.read_text()
    assert "&lt;b&gt;&amp;" in out.read_text()


def test_every_view_of_every_transformation_is_shown(jpegs):
    # The second view is the same window, untouched.
    for name in ("cutout", "color", "sobel", "noise", "blur", "rotate"):
        augment = AugmentConfig(recipe="one_branch", size=32, branch_transformations=(name,))
        for image in sheet_of(jpegs.path, augment=augment, images=12).images:
            said = describe(image.params[0], ViewRecipe(size=32))[1:]
            weak = 0 < image.params[0]["blur_sigma"] < 0.3  # its neighbours weigh less than 0.4 %
            assert weak or (image.views[0] == image.views[1]).all() == (said == ["nothing else"]), (name, said)


def test_a_runs_configuration_gives_augmentation_and_seed(tmp_path):
    run = tmp_path / "config.yaml"
    run.write_text("name: a\nseed: 5\ndata: {path: b}\naugment: {recipe: byol, size: 96, crop_area: [0.2, 0.9]}\n")
    config = parse_config(["a.beton", "--out", "a.png", "--config", str(run), "--augment.size", "64"])
    assert config.augment == AugmentConfig(recipe="byol", size=64, crop_area=(0.2, 0.9))
    assert (config.source, config.seed, config.images) == ("a.beton", 5, 8)
    assert parse_config(["--config", str(run), "--seed=1", "a.beton", "--out=a.png"]).seed == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_can_be_previewed(path):
    parse_config(["a.beton", "--out", "a.png", "--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.gif"], r"`out` must be named \*.png or \*.html, got a.gif"),
        (["--out=a.png", "--images=0"], "`images` must be at least 1, got 0"),
        (["--out=a.png", "--start=-1"], "`start` must be at least 0, got -1"),
        (["--out=a.png", "--images=some"], "`images` must be of type int, got some"),
        (["--out=a.png", "--augment.recipe=simclr3"], "`augment.recipe` must be one of .*'simclr'.*, got simclr3"),
        (
            ["--out=a.png", "--augment.colour_strength=3"],
            "no option `augment.colour_strength`; did you mean `augment.color_strength`",
        ),
        (["--out=a.png", "--augment.color_strength=9"], "`augment.color_strength` must be in"),
        ([], "the following arguments are required: out"),
        (["--out=a.png", "--config=CONFIG"], "has the unknown section `colour`"),
    ],
)
def test_bad_options_are_refused_in_a_line(tmp_path, arguments, message):
    (tmp_path / "config.yaml").write_text("colour: 3\n")
    arguments = [argument.replace("CONFIG", str(tmp_path / "config.yaml")) for argument in arguments]
    with pytest.raises(ValueError, match=message) as caught:
        parse_config(["a.beton", *arguments])
    assert "\n" not in str(caught.value)


def test_bad_sources_are_refused_by_name_and_leave_nothing(jpegs, tmp_path):
    with pytest.raises(ValueError, match=r"`start` must be a row of .*set.beton, 0 to 11, got 12"):
        sheet_of(jpegs.path, start=12)
    with pytest.raises(ValueError, match=r"nowhere.beton: no such file"):
        write_preview(PreviewConfig(source=str(tmp_path / "nowhere.beton"), out=str(tmp_path / "a.png")))
    with pytest.raises(ValueError, match=r"`out` must lie in a folder that exists, got .*a.png; make .*nowhere"):
        PreviewConfig(source=str(jpegs.path), out=str(tmp_path / "nowhere" / "a.png"), images=1)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_names_the_file(jpegs, tmp_path):
    def preview(*arguments):
        command = [sys.executable, "-m", "tools.preview", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment())

    out = tmp_path / "a.png"
    done = preview(jpegs.path, "--out", out, "--images", 2, "--augment.size", 32)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert len(picture_in(out))
    failed = preview(tmp_path / "none.beton", "--out", out)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
