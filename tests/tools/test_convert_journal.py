import json
import os

import numpy as np
import pytest

from tools.beton_writer import ROW_DTYPE
from tools.convert_journal import Block, open_journal
from tools.convert_progress import Begun, begin_words, read_progress

BEGUN = Begun(images="0" * 64, num_images=10, options={"encode": "raw"}, tools={"numpy": "2"})


def rows(*indices):
    made = np.zeros(len(indices), ROW_DTYPE)
    made["index"] = indices
    return made


BLOCKS = [
    Block(kind="begin", words=begin_words(BEGUN, 12.5)),
    Block(kind="open", words={"name": "x-00000.beton", "capacity": 10}),
    Block(kind="rows", words={"next_index": 3, "quarantined": [[1, "is empty: 0 bytes"]]}, rows=rows(0, 2)),
    Block(kind="rows", words={"next_index": 4, "quarantined": []}, rows=rows(3)),
    Block(kind="done", words={"name": "x-00000.beton", "next_quarantined": 1}),
    Block(kind="open", words={"name": "x-00001.beton", "capacity": 6}),
    Block(kind="rows", words={"next_index": 6, "quarantined": [[5, "Zoë \udcff"]]}, rows=rows(4)),
]


def write(path, blocks):
    with open_journal(path) as journal:
        list(journal.blocks())
        for block in blocks:
            journal.append(block)


def read(path):
    with open_journal(path) as journal:
        return [(block.kind, block.words, block.rows.tolist()) for block in journal.blocks()]


def told(blocks):
    return [(block.kind, block.words, block.rows.tolist()) for block in blocks]


def test_what_was_appended_is_read_back(tmp_path):
    write(tmp_path / "j", BLOCKS[:3])
    write(tmp_path / "j", BLOCKS[3:])
    assert read(tmp_path / "j") == told(BLOCKS)


def test_the_progress_it_tells(tmp_path):
    write(tmp_path / "j", BLOCKS)
    with open_journal(tmp_path / "j") as journal:
        progress = read_progress(journal)
    assert (progress.begun, progress.mean_size, progress.next_index) == (BEGUN, 12.5, 6)
    assert progress.quarantined == [(1, "is empty: 0 bytes"), (5, "Zoë \udcff")]
    assert [words["name"] for words in progress.done] == ["x-00000.beton"]
    assert (progress.shard.name, progress.shard.capacity, progress.shard.first_quarantined) == ("x-00001.beton", 6, 1)
    assert progress.shard.rows["index"].tolist() == [4]


def test_torn_anywhere_it_holds_the_whole_blocks_and_goes_on(tmp_path):
    path = tmp_path / "j"
    write(path, BLOCKS)
    whole = path.read_bytes()
    ends = np.cumsum([len(block.to_bytes()) for block in BLOCKS]).tolist()
    assert ends[-1] == len(whole)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        num_whole = sum(end <= length for end in ends)
        assert read(path) == told(BLOCKS[:num_whole]), length
        if length % 29 == 0 or length in ends:
            write(path, BLOCKS[num_whole:])
            assert path.read_bytes() == whole, length


def test_a_flipped_bit_ends_it_there(tmp_path):
    path = tmp_path / "j"
    write(path, BLOCKS)
    whole = path.read_bytes()
    ends = np.cumsum([len(block.to_bytes()) for block in BLOCKS]).tolist()
    for position in range(4, len(whole)):  # the first four say that it is a journal
        spoilt = bytearray(whole)
        spoilt[position] ^= 0x10
        path.write_bytes(spoilt)
        assert read(path) == told(BLOCKS[: sum(end <= position for end in ends)]), position


def test_another_file_is_left_alone(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="j: expected the journal of an unfinished conversion, found another file"):
        read(path)
    assert path.read_bytes() == b"precious"


def test_one_holder_at_a_time_and_nothing_left_if_nothing_was_said(tmp_path):
    path = tmp_path / "j"
    with (
        open_journal(path),
        pytest.raises(ValueError, match="j is being written by another process"),
        open_journal(path),
    ):
        pass
    assert not path.exists()


def test_a_failed_append_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path / "j", BLOCKS[:2])

    def failing(descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "j", BLOCKS[2:3])
    assert read(tmp_path / "j") == told(BLOCKS[:2])


def test_differences_are_told_by_name():
    other = Begun(images="1" * 64, num_images=11, options={"encode": "raw", "quality": 3}, tools={"numpy": "3"})
    assert other.differences(BEGUN) == [
        "the images have changed since; they were 10 and are 11",
        "`quality` was None and is 3",
        "`numpy` was 2 and is 3",
    ]
    assert BEGUN.differences(BEGUN) == []
    assert json.loads(json.dumps(begin_words(BEGUN, 1.0)))["begun"]["num_images"] == 10
