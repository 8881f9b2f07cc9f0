"""Two hosts with addresses of their own train together, one is cut off, and the run goes on as if it had not been.

Nothing is set by hand: neither host's name means an address, and the ranks find the interface by themselves.
"""

import re
import shutil

import pytest

from tests.pipelines.betons import make_beton
from tests.reliability import held
from tests.reliability import hosts as nodes
from tests.reliability.forked import Run
from tests.reliability.processes import assert_same_state, curve, kill_stragglers, last_state, num_checkpoints, wait_for
from tests.reliability.record import record
from tests.train.runs import finish, pretrain
from train.cli import EXIT_RESUMABLE
from train.metrics import read_metrics
from train.runtime import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

NUM_IMAGES = 320
HANG_TIMEOUT_S = 20  # of the run that is cut off
HELD_AT = 12  # there too
SHIFT_S = 90  # of a clock
OPTIONS = (
    "--train.epochs=4",
    "--train.checkpoint_every=5",
    "--train.keep_checkpoints=99",
)
STEPS = 4 * NUM_IMAGES // 16


@pytest.fixture(scope="module", autouse=True)
def _permitted():
    if reason := nodes.why_not():
        pytest.skip(reason)


@pytest.fixture
def data(tmp_path):
    return make_beton(tmp_path, [(24, 20)] * NUM_IMAGES, encode="raw").path


@pytest.fixture
def runs_dir(tmp_path):
    yield tmp_path / "runs"
    kill_stragglers(tmp_path / "runs")


def test_a_host_cut_off_is_named_and_the_run_goes_on_bit_for_bit(data, runs_dir):
    reference_dir = reference(runs_dir.parent / "reference", data)
    with nodes.two_hosts() as hosts:
        hold = held.Hold(runs_dir.parent, HELD_AT, hang_timeout_s=HANG_TIMEOUT_S)
        running = start_by_deepspeed(hosts, runs_dir, data, hold)
        run_dir = runs_dir / "run"
        wait_for(lambda: hold.reached(HELD_AT) and num_checkpoints(run_dir) == 2, running[0])
        hosts.cut_off(1)
        hold.release()
        check_each_host_names_the_other_and_ends([finish(process) for process in running])
        lost_at, resumed_at = read_metrics(run_dir)[-1]["step"], last_state(run_dir).position["step"]
        assert resumed_at == 10 <= lost_at <= HELD_AT + 1
        hosts.join(1)
        port = free_port()
        again = [
            hosts.start(host, pretrain(runs_dir, data, *OPTIONS, launcher=nodes.torchrun(host, port)))
            for host in (0, 1)
        ]
        finish_all(again)
    assert last_state(run_dir).position["step"] == STEPS
    assert_same_state(last_state(run_dir), last_state(reference_dir))
    assert curve(run_dir) == curve(reference_dir)
    record(
        fault="a host is cut off",
        done="two hosts (network namespaces, own addresses), `deepspeed --hostfile`; the cable of one pulled in the "
        "middle of training; resumed by `torchrun --nnodes`",
        runs=3,
        lost_steps=lost_at - resumed_at,
        result="each host names the other's rank and ends with code 75; resumed bit for bit",
    )


def reference(runs_dir, data):
    """The same run on one machine without a launcher."""
    runs_dir.mkdir()
    with Run(runs_dir, data, *OPTIONS) as run:
        run.assert_done()
    return run.run_dir


def start_by_deepspeed(hosts, runs_dir, data, hold):
    hostfile = runs_dir.parent / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in nodes.ADDRESSES))
    port = free_port()
    launchers = [(*nodes.deepspeed(host, port, hostfile), held.SCRIPT) for host in (0, 1)]
    return [
        hosts.start(host, pretrain(runs_dir, data, *OPTIONS, launcher=launcher), hold.variables)
        for host, launcher in enumerate(launchers)
    ]


def check_each_host_names_the_other_and_ends(ended):
    for host, (code, _, err) in enumerate(ended):
        assert code == EXIT_RESUMABLE
        assert re.search(rf"^error: (rank {host}: )?rank {1 - host} has hung", err, flags=re.M), err[-3000:]


def finish_all(processes):
    for process in processes:
        code, _, err = finish(process)
        assert code == 0, err[-3000:]


def test_a_host_that_differs_is_named_before_the_first_step(data, runs_dir, tmp_path):
    """Another rate, other images of the same number, and a clock that is ahead."""
    (tmp_path / "other").mkdir()
    other = make_beton(tmp_path / "other", [(20, 24)] * NUM_IMAGES, encode="raw").path
    shift = shifted_clock()
    with nodes.two_hosts() as hosts:
        port = free_port()
        differs = pretrain(runs_dir, other, *OPTIONS, "--optim.base_lr=0.2")
        running = [
            hosts.start(0, pretrain(runs_dir, data, *OPTIONS), nodes.plain(0, port)),
            hosts.start(1, differs, nodes.plain(1, port) | shift),
        ]
        ended = [finish(process) for process in running]
    assert [code for code, _, _ in ended] == [1, 1]
    said = re.findall(r"^error: .*", ended[0][2], flags=re.M)
    assert len(said) == 1
    assert re.fullmatch(
        r"error: rank 1 \(node-b\) differs from rank 0 \(node-a\): `optim.base_lr` is 0.2, not 0.3, "
        r"the data's `dataset` is \w{8}, not \w{8}"
        + (rf", the clock is {SHIFT_S} s ahead" if shift else "")
        + "; start all ranks with one configuration",
        said[0],
    )
    assert not (runs_dir / "run" / "config.yaml").exists()
    record(
        fault="a host differs: configuration, data, clock",
        done="two hosts, the second with another learning rate, other images"
        + (f" and a clock {SHIFT_S} s ahead (libfaketime)" if shift else ""),
        runs=1,
        lost_steps=0,
        result="refused before the first step; the rank, its host and every difference are named",
    )


def shifted_clock():
    """Environment of a process whose wall clock is ahead; empty where libfaketime is not installed."""
    if shutil.which("faketime") is None:
        return {}
    return {"LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "FAKETIME": f"+{SHIFT_S}"} | {
        "FAKETIME_DONT_FAKE_MONOTONIC": "1"
    }
