"""Two hosts on one machine: network namespaces with addresses and names of their own, joined by a cable.

They share the file system, the process table and the clock, and nothing of the network: what one cannot reach by the
cable it cannot reach.
"""

import os
import shutil
import subprocess
from contextlib import contextmanager

from tests.train.runs import BIN, start

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-a", "node-b")
CABLE = "cable"  # as both call their end


def why_not():
    """What hinders namespaces on this machine; empty: nothing."""
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"network namespaces need {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    name = f"tv-{os.getpid()}-probe"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode != 0:
        return f"`ip netns add` is not permitted: {added.stderr.strip()}"
    ip("netns", "delete", name)
    return ""


class Hosts:
    """Two hosts, 0 and 1."""

    def __init__(self, namespaces):
        self._namespaces = namespaces

    def start(self, host, command, environment=None):
        """Start a command from the project's root on a host; output is text."""
        name = NAMES[host]
        own_name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        return start(["ip", "netns", "exec", self._namespaces[host], *own_name, *command], environment)

    def cut_off(self, host):
        """Pull the cable: packets vanish, and nobody is told."""
        ip("-n", self._namespaces[host], "link", "set", CABLE, "down")

    def join(self, host):
        """Put the cable back."""
        ip("-n", self._namespaces[host], "link", "set", CABLE, "up")

    def route_everything_to(self, host, other):
        """A default route."""
        ip("-n", self._namespaces[host], "route", "add", "default", "via", ADDRESSES[other])


@contextmanager
def two_hosts():
    """`Hosts` that are gone afterwards, whatever happens."""
    namespaces = [f"tv-{os.getpid()}-{name}" for name in NAMES]
    try:
        for namespace in namespaces:
            ip("netns", "add", namespace)
        first, second = namespaces
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for namespace, address in zip(namespaces, ADDRESSES, strict=True):
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", namespace, "link", "set", CABLE, "up")
        yield Hosts(namespaces)
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def torchrun(host, port, num_ranks=1):
    """The launcher, as it is started on each of two hosts."""
    addresses = (f"--master_addr={ADDRESSES[0]}", f"--master_port={port}")
    return (BIN / "torchrun", "--nnodes=2", f"--nproc_per_node={num_ranks}", f"--node_rank={host}", *addresses)


def deepspeed(host, port, hostfile):
    """DeepSpeed's launcher without ssh, as it is started on each of two hosts."""
    addresses = ("--master_addr", ADDRESSES[0], "--master_port", port)
    return (BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", host, *addresses)


def plain(rank, port):
    """No launcher: the environment of one of two ranks."""
    values = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": ADDRESSES[0]}
