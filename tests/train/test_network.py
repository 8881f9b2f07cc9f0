"""The interface towards the master, on this machine and on hosts of two networks."""

import sys

import psutil
import pytest

from tests.reliability import hosts as nodes
from tests.train.runs import finish
from train.network import interface_to


def test_the_master_on_this_machine_is_reached_by_the_interface_that_carries_its_address():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("localhost") == "lo"
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET":
                assert interface_to(address.address) == name


def test_a_master_that_has_no_address_has_no_interface():
    assert interface_to("no-such-host.invalid") is None


def test_two_hosts_find_the_cable_between_them_and_a_loopback_name_means_the_default_route():
    if reason := nodes.why_not():
        pytest.skip(reason)
    asked = ("10.77.0.1", "10.77.0.2", "127.0.0.1", "node-a.debian", "203.0.113.5")
    question = (
        "import socket; from train.network import interface_to\n"
        "resolve = socket.getaddrinfo\n"
        "def with_a_debian_hosts_file(name, *rest, **options):\n"
        "    return resolve('127.0.1.1' if name == 'node-a.debian' else name, *rest, **options)\n"
        "socket.getaddrinfo = with_a_debian_hosts_file\n"
        f"print(*map(interface_to, {asked!r}))"
    )
    with nodes.two_hosts() as hosts:
        assert ask(hosts, question) == ["cable cable lo lo None"] * 2  # no route leads elsewhere
        for host in (0, 1):
            hosts.route_everything_to(host, 1 - host)
        assert ask(hosts, question) == ["cable cable lo cable cable"] * 2


def ask(hosts, question):
    running = [hosts.start(host, [sys.executable, "-c", question]) for host in (0, 1)]
    ended = [finish(process) for process in running]
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [out.strip() for _, out, _ in ended]
