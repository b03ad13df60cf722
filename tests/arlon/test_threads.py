"""`limit_spinning`: seen from the processor time of waiting threads, each time in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arlon import threads

WAITING = """
import os, time
from arlon.threads import limit_spinning
{first}
import torch
torch.set_num_threads(2)
numbers = torch.ones(2**16)
numbers.exp()
before, start = time.process_time(), time.thread_time()
for _ in range(100):
    numbers.exp()
    time.sleep(0.003)
print(time.process_time() - before - (time.thread_time() - start))
"""


def seconds_of_others(first: str, **variables: str) -> float:
    """Processor time of all threads but the main one, which asks for a little work a hundred times and sleeps."""
    env = {name: value for name, value in os.environ.items() if name not in threads.CHOSEN_BY_USER} | variables
    script = WAITING.format(first=first)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs OpenMP of GNU")
def test_threads_sleep_soon() -> None:
    assert seconds_of_others("assert limit_spinning()") < seconds_of_others("") / 3


@pytest.mark.slow
def test_a_choice_of_the_user_stands() -> None:
    seconds_of_others(
        "assert not limit_spinning(); assert 'GOMP_SPINCOUNT' not in os.environ", OMP_WAIT_POLICY="PASSIVE"
    )


def test_it_is_too_late_once_pytorch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.CHOSEN_BY_USER:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert threads.limit_spinning() is False
    assert os.environ["GOMP_SPINCOUNT"] == "1000"  # for the processes that this one starts
