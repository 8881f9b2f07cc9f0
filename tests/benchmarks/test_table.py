"""Tables in documents are those that their files give, and a stale one is found."""

from pathlib import Path

import pytest

from benchmarks import bench_checkpoint, bench_lars, bench_linear_probe, bench_norm, bench_ntxent, bench_pipelines
from benchmarks.harness import Ratio
from benchmarks.results import Results, read_results, write_results
from benchmarks.table import main, peer_title, stale_tables, table, update, work_title
from tests.benchmarks.test_compare import command_of, row

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
NAMED = "docs/results/x.json"


def ratio(work, second, value, goal):
    return Ratio(work=work, first="twinview", second=second, ratio=value, spread=0.1, rounds=5, goal=goal)


@pytest.fixture
def root(tmp_path):
    """A checkout with one result."""
    results = Results(
        rows=[
            row("crop224", "twinview", 6351.6),
            row("crop224", "torchvision", 2024.4),
            row("crop224", "dali_cpu", 1597.9),
            row("ntxent4096", "twinview", 0.154, "s"),
            row("ntxent4096", "lightly", 1.6, "s"),
            row("own", "twinview", 3.0),
            row("own", "someone", 4.0),
        ],
        ratios=[
            ratio("crop224", "torchvision", 3.137, 3.5),
            ratio("crop224", "dali_cpu", 3.97, 3.2),
            ratio("ntxent4096", "lightly", 10.36, 6.0),
            ratio("own", "someone", 0.75, None),
        ],
        environment={"device": "EPYC", "cores": 4, "torch": "2.15.0", "commit": "0123456789abcdef"},
    )
    (tmp_path / "docs" / "results").mkdir(parents=True)
    write_results(tmp_path / NAMED, results)
    return tmp_path


def document(root, *marked, body="old\n", name="README.md"):
    path = root / name
    path.write_text("# Head\n\n" + "\n".join(f"<!-- table: {mark} -->\n{body}<!-- end -->\n\ntext" for mark in marked))
    return path


def test_a_table_by_hand(root):
    assert table(read_results(root / NAMED)).splitlines() == [
        "| work | against | ours | theirs | ratio | goal |",
        "|---|---|---|---|---|---|",
        "| two 224² crops and flips, 500-pixel JPEGs | torchvision v2 (Pillow), DataLoader | 6,352 images/s"
        " | 2,024 images/s | **3.14×** | 3.5× |",
        "|  | DALI on the CPU |  | 1,598 images/s | **3.97×** | 3.2× |",
        "| NT-Xent forward and backward, 4,096 images | lightly | 154 ms | 1.60 s | **10.4×** | 6× |",
    ]


def test_works_and_pairs_are_chosen_in_their_order(root):
    chosen = table(read_results(root / NAMED), ["own/someone", "crop224/dali_cpu"]).splitlines()[2:]
    assert chosen == [
        "| `own` | `someone` | 3.00 images/s | 4.00 images/s | **0.75×** |  |",
        "| two 224² crops and flips, 500-pixel JPEGs | DALI on the CPU | 6,352 images/s | 1,598 images/s"
        " | **3.97×** | 3.2× |",
    ]
    with pytest.raises(ValueError, match="the results hold no ratio of `crop32`; they hold crop224, ntxent4096, own"):
        table(read_results(root / NAMED), ["crop32"])


def test_a_document_is_stale_until_it_is_updated(root):
    path = document(root, f"{NAMED} crop224/torchvision", NAMED)
    stale = stale_tables(path, root)
    assert len(stale) == 2
    assert "README.md: the table of docs/results/x.json crop224/torchvision is not what the file gives; run" in stale[0]
    assert update(path, root=root) == 2
    assert stale_tables(path, root) == []
    text = path.read_text()
    assert text.startswith("# Head\n\n<!-- table: docs/results/x.json crop224/torchvision -->\n\n| work |")
    assert text.endswith("<!-- end -->\n\ntext")
    assert "4 cores of EPYC; torch 2.15.0; commit 0123456789ab; medians of 5 interleaved rounds" in text
    path.write_text(text.replace("3.14×", "4.13×"))
    assert len(stale_tables(path, root)) == 2
    update(path, root=root)
    assert path.read_text() == text


def test_links_start_from_the_document(root):
    (root / "docs" / "guides").mkdir()
    path = document(root, NAMED, name="docs/guides/guide.md")
    update(path, root=root)
    assert "[x.json](../results/x.json)." in path.read_text()
    assert (path.parent / "../results/x.json").exists()


def test_only_the_tables_of_wanted_files_are_written(root):
    path = document(root, NAMED, "docs/results/other.json")
    assert update(path, lambda named: named == NAMED, root) == 1
    assert path.read_text().count("old\n") == 1
    with pytest.raises(ValueError, match=r"other\.json: no such file"):
        update(path, root=root)
    assert path.read_text().count("old\n") == 1  # as it was


def test_marks_that_lead_nowhere_are_named(root):
    assert "other.json: no such file" in stale_tables(document(root, "docs/results/other.json"), root)[0]
    assert "x.json: the results hold no ratio of `crop9`" in stale_tables(document(root, f"{NAMED} crop9"), root)[0]
    torn = root / "torn.md"
    torn.write_text(f"<!-- table: {NAMED} -->\n| a |\n")
    assert "needs its `<!-- end -->`" in stale_tables(torn, root)[0]
    with pytest.raises(ValueError, match=r"torn.md: expected a table between"):
        update(torn, root=root)
    with pytest.raises(ValueError, match=r"absent.md: no such document"):
        update(root / "absent.md", root=root)


def test_the_command_prints_and_complains_in_one_line(root, monkeypatch, capsys):
    code, out, _ = command_of(main, monkeypatch, capsys, root / NAMED, "--works", "own/someone")
    assert code == 0
    assert "| `own` | `someone` |" in out
    code, out, err = command_of(main, monkeypatch, capsys, root / "absent.json")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, _, err = command_of(main, monkeypatch, capsys)
    assert (code, err) == (2, "error: nothing to do: name result files, or documents after `--update`\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_in_the_documents_is_what_its_file_gives(path):
    assert stale_tables(path) == []


@pytest.mark.parametrize("name", ["2026-11-22-pipelines-cpu.json", "2026-11-22-exactness-cpu.json"])
def test_results_of_record_stay_readable(name):
    results = read_results(ROOT / "docs" / "results" / name)
    assert results.rows
    assert table(results).count("\n") == len(results.ratios) + 1


def test_works_and_peers_have_names_that_a_reader_understands():
    works = [*(work.name for work in bench_pipelines.WORKS), *bench_lars.ENCODERS, *bench_norm.LAYERS]
    works += [
        *bench_linear_probe.WORKS,
        *(f"ntxent{n}" for n in bench_ntxent.FLOORS),
        "startup",
        "norm_r50_stage1_ranks2",
    ]
    peers = [*bench_pipelines.CONTESTANTS, *bench_pipelines.CROP224.goals, *bench_ntxent.FORMS, *bench_lars.STEPS]
    peers += [*bench_checkpoint.FLOORS, *bench_linear_probe.STEPS]
    assert not [name for name in works if "`" in work_title(name)]
    assert not [name for name in peers if name != "twinview" and peer_title(name) == f"`{name}`"]
