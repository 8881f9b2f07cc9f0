"""Contestants whose speed, cost and memory are known; they run in processes of their own."""

import multiprocessing
import os
import time

import numpy as np
import torch


def sleeper(seconds):
    return lambda num_items: time.sleep(seconds * num_items)


def spinner(seconds):
    def run(num_items):
        end = time.process_time() + seconds * num_items
        while time.process_time() < end:
            pass

    return run


def spinner_in_a_worker(seconds):
    """Its work is done by a process that it starts, like a DataLoader's."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_spin_on_demand, args=(theirs, seconds), daemon=True).start()

    def run(num_items):
        ours.send(num_items)
        ours.recv()

    return run


def _spin_on_demand(pipe, seconds):
    spin = spinner(seconds)
    while True:
        pipe.send(spin(pipe.recv()))


def hoarder(mebibytes):
    """Takes memory and frees it again."""

    def run(num_items):
        time.sleep(0.001 * num_items)
        np.ones(mebibytes << 17)

    return run


def saves_for_backward(mebibytes):
    """Its forward keeps exp(x), its backward makes a gradient as large."""
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).exp().sum().backward()  # loads the code, which takes memory too
    x = torch.ones(mebibytes << 18, requires_grad=True)

    def run(num_items):
        for _ in range(num_items):
            x.grad = None
            x.exp().sum().backward()

    return run


def fails_in_setup():
    raise ValueError("no such image set")


def fails_in_its_turn():
    def run(num_items):
        raise ValueError(f"{num_items} items are too many")

    return run


def dies():
    return lambda num_items: os._exit(7)


def save_views(path, make, works, num_images):
    """Save both views of the first images of each work; `works` holds the arguments of `make`."""
    torch.manual_seed(0)
    views = {}
    for work, arguments in works.items():
        batches = [[view.numpy().copy() for view in batch] for batch in make(*arguments)(num_images)]
        views |= {f"{work}.{v}": np.concatenate([batch[v] for batch in batches]) for v in range(2)}
    np.savez(path, **views)
