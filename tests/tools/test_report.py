"""The page of a run or of several: what it says, what it says of what is missing, and that it loads nothing."""

import base64
import hashlib
import itertools
import json
import shlex
import shutil
import sys

import pytest
import yaml

from tests.pipelines.betons import make_beton
from tests.reliability.forked import Run
from tests.tools.browser import CHROMIUM, Browser
from tests.tools.reported import Page, make_run, metrics
from tests.train.evaluated import evaluate
from tools import report
from tools.report import write_report
from tools.report_learned import choose_data
from tools.report_runs import read_run
from train.cli import run
from train.config import config_from_dict, parse_pretrain_config, read_run_config, resolved_dict

HOSTILE = "<img src=x onerror=alert(1)>'\"&amp;\u202e"
STEPS = 9  # of 48 images in batches of 16, thrice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that really trained, and one that differs from it; the first is evaluated."""
    folder = tmp_path_factory.mktemp("report")
    make_beton(folder, [(24, 20)] * 48, encode="raw", num_classes=3)
    with Run(folder, folder / "set.beton", world_size=1) as trained:
        trained.assert_done()
    code = evaluate(
        "knn", "--checkpoint", folder / "run", *(f"--{s}_data={folder}/set.beton" for s in ("train", "test"))
    )
    assert code == 0
    shutil.copytree(folder / "run", folder / HOSTILE)
    changed = folder / HOSTILE / "config.yaml"
    config = yaml.safe_load(changed.read_text())
    config["name"], config["model"]["temperature"] = HOSTILE, 0.25
    changed.write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / HOSTILE / "evaluation")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return write_report(folder / "run")


@pytest.fixture(scope="module")
def two(folder):
    return write_report(folder / "run", folder / HOSTILE, out=folder / "two.html")


def read(path):
    return Page(path.read_text())


def test_the_page_of_a_run_that_trained(folder, one):
    assert one == folder / "run" / "report.html"
    page = read(one)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"statusfinishedall {STEPS} steps" in page.text
    assert f"images seen{16 * STEPS}3 epochs of 48" in page.text
    assert f"{lines[-1]['loss']:.4g}"[:4] in page.text.split("last loss")[1][:8]
    found = json.loads((folder / "run" / "evaluation" / "knn-learned.json").read_text())
    top1 = found["figures"]["all"]["top1"]["mean"]
    assert f"top-1 accuracy{100 * top1:.1f} %knn, 48 test images" in page.text
    assert ["knn, learned", f"{100 * top1:.1f} ± 0.0"] in page.rows
    assert ["ranks", "1"] in page.rows
    assert "48 training images" in page.text
    assert page.text.count("neighbours shown are of its class") == 1
    assert len([image for image in page.of("img") if image["alt"].startswith("view ")]) == 12 * 2
    assert len([image for image in page.of("img") if image["alt"].startswith("query, class")]) == 8
    assert "Not drawn yet" in page.text  # a confusion matrix


@pytest.mark.parametrize("which", ["one", "two"])
def test_everyone_can_read_it_and_nothing_is_loaded(which, request):
    source = request.getfixturevalue(which).read_text()
    page = Page(source)
    headings = page.headings()
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [attributes["aria-labelledby"] for attributes in page.of("section")]
    assert set(named) <= set(ids)
    links = [attributes["href"] for attributes in page.of("a")]
    assert len(links) > 7
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.of("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.of("svg"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(cell["scope"] in ("col", "row") for cell in page.of("th"))
    assert [len(page.of(tag)) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    assert page.of("html") == [{"lang": "en"}]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert "url(" not in source
    assert "@import" not in source
    style = source.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_two_runs_side_by_side(two):
    page = read(two)
    hostile = HOSTILE.replace("\u202e", "\ufffd")
    assert ["field", "run", hostile] in page.rows
    assert ["model.temperature", "0.5", "0.25"] in page.rows
    assert [row[0] for row in page.rows if row[0].startswith(("data.", "optim.", "train."))].count("train.epochs") == 2
    assert ["status", f"finished (all {STEPS} steps)", f"finished (all {STEPS} steps)"] in page.rows
    assert any(row[0] == "knn, learned, all labels" and row[2] == "–" for row in page.rows)
    lines = [svg for svg in page.of("path") if svg.get("class", "").startswith("run ")]
    assert {line["class"] for line in lines} == {"run c0 d0", "run c1 d1"}
    assert not [image for image in page.of("img") if image["src"] == "x"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the PATH")
def test_a_browser_shows_it_on_a_desktop_and_a_phone_light_and_dark(one, two, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        backgrounds = set()
        for path in (one, two):
            for width in (1280, 360):
                for scheme in ("light", "dark"):
                    browser.open(path.as_uri(), width=width, scheme=scheme)
                    assert browser.complaints() == []
                    others = [url for url in browser.requests() if not url.startswith("data:image/")]
                    assert others == [path.as_uri()]
                    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
                    assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
                    backgrounds.add((scheme, browser.value("getComputedStyle(document.body).backgroundColor")))
        assert backgrounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 31)")}
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_the_same_configuration(folder, one):
    page = read(one)
    command, started = [line for line in page.said if line.startswith("python train/pretrain.py")]
    assert started.startswith("python train/pretrain.py --name=run --runs_dir=")
    words = shlex.split(command)
    again = parse_pretrain_config(words[2:])
    before = config_from_dict(read_run_config(folder / "run"))
    assert again.name == "run-again"
    assert resolved_dict(again) | {"name": "run"} == resolved_dict(before)


def test_a_run_that_has_nothing_yet(tmp_path):
    page = read(write_report(make_run(tmp_path)))
    assert "no step finished" in page.text
    assert "There are no metrics yet" in page.text
    assert "Not evaluated yet" in page.text
    assert "no.beton is not here" in page.text
    assert "There is no checkpoint yet" in page.text
    assert "one is assumed" in page.text


def test_a_run_that_is_damaged_everywhere(tmp_path):
    torn = ['{"step": 3, "loss": "NaN", "images_per_sec": 1, "data_wait": 0}\n', "\0\0\0\n", '{"step": 4, "lo']
    run_dir = make_run(tmp_path, HOSTILE, lines=[*metrics(2), *torn], step=2)
    checkpoint = run_dir / "checkpoints" / "step-000000002.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:40])
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "knn-learned.json").write_text('{"format": "twinview-evaluation"}')
    (run_dir / "pictures").mkdir()
    (run_dir / "pictures" / "confusion-knn.json").write_text('{"classes": ["<b>"]}')
    (run_dir / "starts.jsonl").write_text('{"time": 1e99, "command": "<b>"}\n[1]\n{"wor')
    config = run_dir / "config.yaml"
    config.write_text(config.read_text() + "newer:\n  than: this\n")
    page = read(write_report(run_dir))
    assert "2 lines of metrics.jsonl are no whole records" in page.text
    assert "1 values are not finite" in page.text
    assert "another version of Twinview" in page.text
    assert "step-000000002.safetensors is not a checkpoint, or was cut off" in page.text
    assert "knn-learned.json must be the JSON of an evaluation, got a damaged file" in page.text
    assert "confusion-knn.json is damaged" in page.text
    assert "interruptedat step 3" in page.text
    assert not page.of("b") or "<b>" not in page.text


def test_which_images_are_looked_at(tmp_path):
    (tmp_path / "here").mkdir()
    here, gone = str(tmp_path / "here"), str(tmp_path / "gone")
    found = read_run(make_run(tmp_path, data=here), "run")
    assert choose_data(found, [{"test_data": gone}], "given") == "given"
    assert choose_data(found, [{"test_data": gone}], None) == here
    assert choose_data(found, [{"test_data": gone}, {"test_data": str(tmp_path)}], None) == str(tmp_path)
    assert choose_data(read_run(make_run(tmp_path, "b", data=gone), "b"), [], None) is None


def test_images_without_labels(folder, tmp_path):
    images = tmp_path / "photos"
    images.mkdir()
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))[::4]):
        shutil.copy(path, images / f"{i}.png")
    path = write_report(folder / "run", out=tmp_path / "out.html", test_data=str(images))
    page = read(path)
    assert "12 images of" in page.text
    assert "a mark an image, without labels" in page.of("svg")[-1]["aria-label"] or any(
        "without labels" in svg.get("aria-label", "") for svg in page.of("svg")
    )
    assert "are of its class" not in page.text
    named = {image["alt"].removeprefix("query, ") for image in page.of("img") if image["alt"].startswith("query")}
    assert len(named) == 8
    assert named <= {path.name for path in images.iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{}/none"], "{}/none holds no config.yaml; give the directory of a run"),
        (["{}/run", "{}/run/../run"], "RUN must name each run once, got {}/run/../run twice"),
        (
            ["{}/run", "--test_data", "{}/none"],
            "`--test_data` must name a .beton or a folder of images, {}/none is not",
        ),
        (["{}/run", "--out", "{}/none/a.html"], "`--out` must lie in a folder that exists, got {}/none/a.html; make"),
        (["{}/run"] * 33, "RUN must name at most 32 runs, got 33; compare fewer"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, words, told):
    make_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *(word.format(tmp_path) for word in words)])
    with pytest.raises(SystemExit) as ended:
        run(report.main)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {told.format(tmp_path)}")
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.rglob("*.html*"))


def test_the_command_without_pictures(tmp_path, monkeypatch, capsys):
    first, second = make_run(tmp_path, "a", lines=metrics(3)), make_run(tmp_path, "b", lines=metrics(5))
    monkeypatch.setattr(sys, "argv", ["report", str(first), str(second), "--no-pictures"])
    with pytest.raises(SystemExit) as ended:
        run(report.main)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    page = read(tmp_path / "report.html")
    assert page.text.count("Left out by --no-pictures") == 2
    assert "The configurations differ in nothing but the name." in page.text
