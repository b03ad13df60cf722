"""`keep_freed_memory`: seen from page faults, in a process of its own, since it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from arlon import memory

FAULTS = """
import resource
from arlon.memory import keep_freed_memory
{first}
size = 2**26
def work():
    assert len(b"x" * size) == size
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str, **variables: str) -> int:
    """Page faults of five rounds of work with large blocks, after five others."""
    env = {name: value for name, value in os.environ.items() if name not in memory.CHOSEN_BY_USER} | variables
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(first=first)], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not memory._is_glibc(), reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    kept = faults("assert keep_freed_memory()")
    given_back = faults("")
    # five times 64 MiB are 81,920 pages of 4 KiB, or 160 of 2 MiB
    assert given_back >= 160
    assert kept < given_back / 10


@pytest.mark.skipif(not memory._is_glibc(), reason="needs glibc")
def test_a_choice_of_the_user_stands() -> None:
    assert faults("assert not keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="131072") >= 160


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(memory.os, "confstr", unknown, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the C library was touched"))
    assert memory.keep_freed_memory() is False


def test_weights_are_moved_to_where_pytorch_puts_them() -> None:
    """As they lie in a file that is mapped: behind a header that is no multiple of 64 bytes."""
    module = torch.nn.Linear(24, 3)
    module.register_buffer("mean", torch.zeros(3))
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tied = module.weight
    for tensor in (*module.parameters(), *module.buffers()):
        memory_of_another = torch.empty(tensor.numel() + 16)
        first = (8 - memory_of_another.data_ptr() // 4) % 16
        place = memory_of_another[first : first + tensor.numel()].view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
        assert tensor.data_ptr() % memory.ALIGNMENT == 32
    memory.align_weights(module)
    assert all(t.data_ptr() % memory.ALIGNMENT == 0 for t in (*module.parameters(), *module.buffers()))
    assert module.weight is tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


GIVEN_BACK = """
import ctypes, os
from arlon.memory import release_memory, keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
import torch
blocks = [bytes(2**22).replace(b"\\0", b"\\1") for _ in range(32)]
pin = b"x" * 100_000
before = resident()
blocks.clear()
kept = resident()
release_memory()
print(before - kept, before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not memory._is_glibc(), reason="needs glibc")
def test_freed_memory_goes_back_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    at_once, later = map(int, done.stdout.split())
    assert at_once < 2**24 < 100 * 2**20 < later
