"""No `.beton` crashes the process, hangs it, or comes out as anything but views or one of the documented errors.

TWINVIEW_FUZZ_CASES sets how many cases are tried; `python -m tests.reliability.fuzz_beton` shows what a case is.
"""

import os
import random
import time

import pytest

from tests.reliability.fuzz_beton import fuzz, make_case, open_drafts, parse
from tests.reliability.fuzz_corpus import make_corpus
from tests.reliability.record import record

NUM_CASES = int(os.environ.get("TWINVIEW_FUZZ_CASES") or 2000)
SEED = 0


@pytest.mark.timeout(300 + NUM_CASES)
def test_no_file_crashes_the_process(tmp_path):
    jobs = 1 if NUM_CASES < 10_000 else 2
    begin = time.monotonic()
    counts, failures = fuzz(parse([f"--cases={NUM_CASES}", f"--seed={SEED}", f"--jobs={jobs}"]), tmp_path)
    seconds = time.monotonic() - begin
    assert failures == [], failures[:10]
    assert sum(counts.values()) == NUM_CASES
    assert min(counts[outcome] for outcome in ("refused at opening", "all views", "a sample refused", "no views")) > 0
    outcomes = ", ".join(f"{outcome}: {number}" for outcome, number in sorted(counts.items()))
    record(
        fault="a `.beton` damaged or made to harm",
        done=f"{NUM_CASES} mutated files opened, verified and decoded in fenced memory, seed {SEED}, {seconds:.0f} s",
        runs=NUM_CASES,
        lost_steps="none",
        result=f"no crash, no hang, no other error; {outcomes}",
    )


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return open_drafts(folder)


def test_a_case_follows_from_its_seed_and_number_and_is_undone_whole(drafts):
    contents = []
    for number in range(300):
        draft, _ = make_case(drafts, 5, number)
        draft.commit()
        assert draft.path.read_bytes() == draft.content()
        contents.append((draft.path, draft.content()))
        draft.undo()
        assert draft.path.read_bytes() == draft.base == draft.content()
    for number in random.Random(0).sample(range(300), 20):
        draft, _ = make_case(drafts, 5, number)
        assert (draft.path, draft.content()) == contents[number]
        draft.undo()
    assert len(set(contents)) > 270
    assert sum(content != path.read_bytes() for path, content in contents) > 270


def test_the_corpus_has_every_kind_of_image(drafts):
    frames = {marker for draft in drafts for sample in draft.samples for marker, _, _ in sample.segments}
    assert {0xC0, 0xC2, 0xC9, 0xDD, 0xE9, 0xEE} <= frames  # baseline, progressive, arithmetic, restarts, rows, CMYK
    assert {sample.mode for draft in drafts for sample in draft.samples} == {0, 1}
    assert {len(draft.samples) for draft in drafts} >= {1, 3, 4, 70}
    assert any(draft.num_allocations > len(draft.samples) for draft in drafts)  # other fields
