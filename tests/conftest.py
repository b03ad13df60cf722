"""What every test runs under: one thread, a fixed seed, no network; one tiny model and one Ray session for all."""

from __future__ import annotations

import ast
import functools
import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arlon.threads import limit_spinning

# Test processes share the cores, and OpenMP reads this when PyTorch is imported.
limit_spinning()

import torch  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
torch.set_num_threads(1)

OBJECT_STORE_BYTES = 200 * 2**20


@functools.cache
def marked_tests(path: Path, mark: str) -> frozenset[str]:
    """Names of the test functions of a file that have a mark, by themselves or with the whole file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = f"pytest.mark.{mark}"
    whole_file = any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and wanted in ast.unparse(node)
        for node in tree.body
    )
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return frozenset(
        function.name
        for function in functions
        if whole_file or any(wanted in ast.unparse(decorator) for decorator in function.decorator_list)
    )


@functools.cache
def has_shared_fixtures(path: Path) -> bool:
    """Whether tests of a file share something that takes time to make."""
    return 'scope="module"' in path.read_text(encoding="utf-8")


def work_unit(root: Path, nodeid: str) -> tuple[str, int]:
    """What has to run in one process with a test, and how much the test weighs among others.

    All tests that use Ray are one unit, so that Ray is started once. Tests of a file stay together, but slow ones that
    share nothing with others are units of their own: whichever process is free takes them.
    """
    file, name = nodeid.split("[")[0].split("::")[:2]
    path = root / file
    if name in marked_tests(path, "ray"):
        return "ray", 1000
    if name in marked_tests(path, "slow"):
        return file if has_shared_fixtures(path) else nodeid, 50
    return file, 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: give the heaviest unit of work out first, so that no process is left alone at the end."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return work_unit(config.rootpath, nodeid)[0]

        def _assign_work_unit(self, node: Any) -> None:
            def weight(unit: str) -> int:
                return sum(work_unit(config.rootpath, nodeid)[1] for nodeid in self.workqueue[unit])

            self.workqueue.move_to_end(max(self.workqueue, key=weight), last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse streams that leave this machine; Unix sockets and the machine's own addresses stay open."""
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
    yield
    patch.undo()


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        # Connecting a datagram socket sends nothing; Ray does it to learn the machine's own address.
        stream = self.family in (socket.AF_INET, socket.AF_INET6) and self.type & socket.SOCK_STREAM
        if stream and not is_local(address[0]):
            raise RuntimeError(f"tests run without network, refused to connect to {address[0]}:{address[1]}")
        return connect(self, address)

    return guarded


def is_local(host: str) -> bool:
    """Whether a host is this machine or in its private network, which Ray's own processes talk over."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_link_local


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model; see `tests/pipelines/tiny_model.py`."""
    from tests.pipelines.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel of this project, built from a copy of the source tree."""
    from tests.wheels import build_wheel

    return build_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """A local Ray, started once for the whole run; starting it takes several seconds."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()
