"""Files of text that others may have written: manifests, configurations, metrics, the heads of checkpoints.

Each is changed by a seed's random numbers, or is made to harm; what comes out is its values or one line.
"""

import json
import random
import struct
import time

import pytest
import torch
import yaml

from pipelines.manifest import ManifestError, load_manifest, manifest_path
from tests.pipelines.betons import make_beton
from tests.reliability.record import record
from tools.verify import verify
from train.checkpoint import Checkpoint, load_checkpoint, read_sections, save_checkpoint
from train.config import claim_run_dir, config_from_dict, parse_pretrain_config, read_run_config
from train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from train.plain_yaml import load_plain_yaml

VALUES = (
    "null",
    "true",
    "-1",
    "1e400",
    "NaN",
    "[]",
    "{}",
    '"../x"',
    '"\\ud800"',
    "[" * 50_000,
    "9" * 5000,
    "1e5",
    '""',
)
NUM_CASES = 400
LIMIT_S = 20.0  # of a core, for what takes milliseconds


def changed_text(rng, text):
    """Bytes lost, doubled, replaced; values of other types in their places."""
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(at + rng.choice((0, 1, 5, 40)), len(data))
        if rng.random() < 0.5:
            at = data.find(b":", at) + 1
            end = max(at, data.find(b",", at))
            data[at:end] = rng.choice(VALUES).encode()
        else:
            data[at:end] = rng.choice((b"", rng.randbytes(3), data[at:end] * 2, b"\xff", b"\0", b"{", b"]", b'"'))
        if not data:
            return b""
    return bytes(data)


def refusal(work, error):
    """The line that it was refused with, or None; what else comes out is for the test to fail at."""
    begin, message = time.process_time(), None
    try:
        work()
    except error as refused:
        message = str(refused)
    assert "\n" not in (message or "")
    assert time.process_time() - begin < LIMIT_S
    return message


def test_manifests(tmp_path):
    beton = make_beton(tmp_path, [(8, 8)] * 3, encode="raw").path
    sound, rng, refused = manifest_path(beton).read_bytes(), random.Random(0), 0
    for _ in range(NUM_CASES):
        manifest_path(beton).write_bytes(changed_text(rng, sound))
        refused += refusal(lambda: load_manifest(beton), ManifestError) is not None
        for problem in verify(beton, workers=1):
            assert problem.isprintable()
    assert NUM_CASES // 4 < refused < NUM_CASES
    record(
        fault="a manifest damaged or made to harm",
        done=f"{NUM_CASES} mutated manifests read, and verified",
        runs=NUM_CASES,
        lost_steps="none",
        result=f"{refused} refused in a line, the others read",
    )


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "alias"),
        ("a: &a {b: *a}", "alias"),
        ("[" * 100_000, "deeper"),
        ("{a: " * 5000, "deeper"),
        ("- " * 5000, "deeper"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: " + "9" * 5000, "limit"),
        ("a: 2001-99-99", "month"),
        ("x" * 2**21, "characters"),
    ],
)
def test_yaml_is_plain_or_refused(text, reason):
    begin = time.process_time()
    with pytest.raises(yaml.YAMLError, match=reason):
        load_plain_yaml(text)
    assert time.process_time() - begin < LIMIT_S


def test_plain_yaml_is_what_yaml_says():
    values = {"a": [1, 2.5, None, True, "x"], "b": {"c": {"d": []}}, "e": "é\n"}
    assert load_plain_yaml(yaml.safe_dump(values)) == values
    assert load_plain_yaml("") is None


def test_configurations_of_run_directories(tmp_path):
    config = parse_pretrain_config(["--name=run", f"--runs_dir={tmp_path}", "--data.path=x.beton"])
    claim_run_dir(config)
    path = config.run_dir / "config.yaml"
    sound, rng, refused = path.read_bytes(), random.Random(0), 0
    harmful = [LAUGHS.encode(), b"[" * 100_000, b"a: &a {b: *a}", b"- " * 5000, b"a: " + b"9" * 5000]
    for text in [*harmful, *(changed_text(rng, sound) for _ in range(NUM_CASES // 10))]:
        path.write_bytes(text)
        refused += refusal(lambda: config_from_dict(read_run_config(config.run_dir)), ValueError) is not None
    assert refused >= len(harmful)
    for name in ("../outside", "/tmp/outside", "..", "a/b", ""):
        with pytest.raises(ValueError, match="`name` must be a plain folder name"):
            parse_pretrain_config([f"--name={name}", f"--runs_dir={tmp_path}", "--data.path=x.beton"])


def test_metrics(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"loss": 0.5 * step, "lr": 0.1})
    path, rng = tmp_path / METRICS_FILE, random.Random(0)
    sound = path.read_bytes()
    harmful = [b"[1]\n", b'{"step": 1, "loss": null}\n', b'{"step": "a"}\n', b"[" * 100_000, b'{"step": null}\n']
    harmful += [b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n", b'{"step": [1]}\n', b"7\n", b"\xff\xfe\n"]
    for text in [*(sound + text for text in harmful), *(changed_text(rng, sound) for _ in range(NUM_CASES))]:
        path.write_bytes(text)
        for line in read_metrics(tmp_path):
            assert all(isinstance(value, float | int) for value in line.values())
            assert line["step"] <= 10**30


def checkpoint_heads(sound):
    """Files whose headers lie."""
    length = struct.unpack("<Q", sound[:8])[0]
    head, body = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    name = next(key for key in head if key != "__metadata__")
    entry = head[name]

    def with_entry(**changes):
        return with_head(json.dumps(head | {name: entry | changes}).encode())

    def with_head(text):
        return struct.pack("<Q", len(text)) + text + body

    yield from (
        struct.pack("<Q", value) + sound[8:] for value in (0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1)
    )
    for offsets in (
        [0, 0],
        [0, 1],
        [4, 0],
        [-1, 3],
        [0, 2**40],
        [2**63, 2**63 + 4],
        [0, 2**64 - 1],
        [1, 2, 3],
        [],
        "a",
        [0.5, 4],
    ):
        yield with_entry(data_offsets=offsets)
    for shape in ([2**62, 4], [2**32, 2**32], [-1], [0], [2**64], [[1]], "a", [0, 2**63], [1] * 5000):
        yield with_entry(shape=shape)
        yield with_entry(shape=shape, data_offsets=[0, 0])
    yield with_entry(shape=[*entry["shape"], *[1] * 100])  # more dimensions than a tensor may have
    for dtype in ("F128", "", None, 7, "BF16"):
        yield with_entry(dtype=dtype)
    yield from (
        with_head(text) for text in (b"[" * 200_000, b'{"a":' * 100_000, b"{}", b"[]", b"null", b"7", b"\xff\xfe")
    )
    yield with_head(json.dumps(head).replace(f'"{name}"', '"model.twice"', 1).encode() * 2)
    yield with_head(f'{{"{name}": {json.dumps(entry)}, {json.dumps(head)[1:]}'.encode())  # the key twice
    meta = head["__metadata__"]
    for key in meta:
        for value in ("[" * 200_000, "null", "[]", "7", "{", "", '{"a": NaN}', "9" * 10_000):
            yield with_head(json.dumps(head | {"__metadata__": meta | {key: value}}).encode())
    yield with_head(json.dumps(head | {"__metadata__": {"format": 7}}).encode())
    yield with_head(
        json.dumps(
            head | {f"model.{i}": entry | {"shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ).encode()
    )


def test_checkpoints(tmp_path):
    path = tmp_path / "step-000000001.safetensors"
    model = {"b": torch.ones(3, dtype=torch.int64), "a": torch.arange(6.0).view(2, 3)}
    optimizer = {"a": {"momentum_buffer": torch.zeros(2, 3)}}
    save_checkpoint(path, Checkpoint(model=model, optimizer=optimizer, position={"step": 1}))
    sound, rng, num, tensors = path.read_bytes(), random.Random(0), 0, (model, optimizer)
    for data in [*checkpoint_heads(sound), *(changed_text(rng, sound) for _ in range(NUM_CASES))]:
        path.write_bytes(data)
        num += data != sound
        refusal(lambda: read_sections(path), ValueError)
        if refusal(lambda: load_checkpoint(path), ValueError) is None:  # a header that says the same in other words
            found = load_checkpoint(path)
            assert found.position == {"step": 1}
            assert str((found.model, found.optimizer)) == str(tensors)
    record(
        fault="a checkpoint damaged or made to harm",
        done=f"{num} files whose headers lie or whose bytes were changed, loaded",
        runs=num,
        lost_steps="none",
        result="each refused in a line, or read as what was saved",
    )
