"""What all tests share: one thread, an own base directory, compiled kernels kept between runs, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}

import pkgutil
import socket
import threading
from importlib import import_module

import pytest
import torch
from tqdm import tqdm

from nanochat import blocks
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS
from tasks.factbook import load_documents

LOCAL = {"localhost", "localhost.localdomain", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname(), "", None}

# Tests fork and kill children. tqdm's own lock is shared with them, and one that dies holding it blocks us for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny tensors gain nothing from two, and sums keep their order


@pytest.fixture(scope="session", autouse=True)
def base_dir(tmp_path_factory, pytestconfig):
    """A base directory for the session; a test that wants its own sets NANOCHAT_BASE_DIR itself.

    The kernels of nanochat/blocks are not compiled anew for each: they live in pytest's cache folder, under names that
    change with their source, compiler and machine.
    """
    base = tmp_path_factory.mktemp("nanochat")
    # without a cache folder (-p no:cacheprovider) they are compiled once a session
    cache = pytestconfig.cache.mkdir("nanochat") if getattr(pytestconfig, "cache", None) else base
    (cache / "kernels").mkdir(exist_ok=True)
    if cache != base:
        (base / "kernels").symlink_to(cache / "kernels", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for name in [found.name for found in pkgutil.iter_modules(blocks.__path__)]:
            module = import_module(f"nanochat.blocks.{name}")
            if hasattr(module, "get_base_dir"):
                patch.setattr(module, "get_base_dir", lambda: cache)
        yield base


@pytest.fixture(scope="session")
def documents() -> dict[str, dict]:
    """The factbook's passages by id; not to be changed."""
    return load_documents()


@pytest.fixture(scope="session")
def tiny() -> GPT:
    """A small untrained model that reads bytes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(512, 256 + len(SPECIAL_TOKENS), 1, 2, 2, 32, "T"))
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Connections to other machines fail at once, as on a machine that is offline; loopback works (gloo needs it)."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(address[0]):
            raise OSError(f"tests have no network: {address[0]}")
        return connect(self, address)

    def guarded_resolve(host, *args, **kwargs):
        if not _local(host):
            raise socket.gaierror(socket.EAI_FAIL, f"tests have no network: {host}")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield


def _local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    return host in LOCAL or (isinstance(host, str) and host.startswith("127."))
