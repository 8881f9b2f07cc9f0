import os

import pytest

from tools.image_folder import scan_images


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of empty files with these names and returns its path."""

    def make(*names):
        root = tmp_path / "source"
        root.mkdir()
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return make


def refusal(root):
    with pytest.raises(ValueError, match="must") as caught:
        scan_images(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_come_in_torchvisions_order(folder):
    from torchvision.datasets import ImageFolder

    root = folder(
        "b/2.jpg",
        "b/10.jpg",
        "b/x/1.jpg",
        "b/x-y/1.jpg",
        "b/X/1.jpg",
        "a/z.png",
        "a/Ä.JPEG",
        "C/deep/er/1.webp",
    )
    scanned = scan_images(root)
    theirs = ImageFolder(str(root))
    assert scanned.classes == theirs.classes == ["C", "a", "b"]
    expected = [(os.path.relpath(path, root), label) for path, label in theirs.samples]
    assert list(zip(scanned.files, scanned.labels, strict=True)) == expected


def test_hidden_files_and_those_of_file_browsers_are_left_out(folder):
    root = folder("a/1.jpg", "a/.DS_Store", "a/Thumbs.db", "a/._1.jpg", ".git/x.jpg", "a/.cache/y.jpg", ".DS_Store")
    scanned = scan_images(root)
    assert (scanned.files, scanned.classes, scanned.strays) == (["a/1.jpg"], ["a"], [])


def test_whatever_else_is_there_is_listed_to_be_tried(folder):
    root = folder("README.md", "LICENSE", "a/1.jpg", "a/notes.txt", "b/no_suffix")
    scanned = scan_images(root)
    assert scanned.files == ["a/1.jpg", "a/notes.txt", "b/no_suffix"]
    assert scanned.labels == [0, 0, 1]
    assert scanned.strays == ["LICENSE", "README.md"]


def test_a_flat_folder_has_no_labels(folder):
    scanned = scan_images(folder("b.jpg", "a.png", "notes.txt"))
    assert scanned.files == ["a.png", "b.jpg", "notes.txt"]
    assert scanned.labels is scanned.classes is None


def test_linked_folders_are_followed_once(folder):
    root = folder("a/1.jpg", "b/2.jpg")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "other").symlink_to(root / "b")
    (root / "c").symlink_to(root / "b")
    assert scan_images(root).files == ["a/1.jpg", "a/other/2.jpg", "b/2.jpg", "c/2.jpg"]


def test_a_link_to_itself_is_a_file_that_cannot_be_read(folder):
    root = folder("a/1.jpg")
    (root / "loop").symlink_to("loop")
    assert scan_images(root).strays == ["loop"]


def test_folders_that_cannot_be_converted_are_refused_in_one_line(folder, tmp_path):
    root = folder("a/1.jpg")
    assert f"found none at {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")
    assert "found a file at" in refusal(root / "a" / "1.jpg")
    (root / "loose.png").touch()
    assert "found both (folder 'a', image 'loose.png'); pass --unlabelled" in refusal(root)
    (root / "loose.png").unlink()
    (root / "b").mkdir()
    assert f"class folder {root / 'b'} must hold images, found 0 other files" in refusal(root)
    (root / "b" / "notes.txt").touch()
    assert "found 1 other files" in refusal(root)


def test_an_empty_folder_is_refused(folder):
    assert "must hold images, or class folders with images, found none" in refusal(folder())


def test_a_folder_of_other_files_is_refused(folder):
    assert "found none" in refusal(folder("notes.txt", "data.csv"))
