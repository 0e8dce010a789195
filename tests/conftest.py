"""Settings of all tests: eight CPU devices, so that meshes are real; hypothesis profiles; shared fixtures."""

import gc
import os
import pathlib

import jax
import pytest
from hypothesis import settings

import tests.typecheck  # noqa: F401 (before lvm: `--jaxtyping-packages` looks it up there)
from tests.commands import COMPILER_FLAGS, TINY_DEMO, compilation_cache, run
from tests.gcs import fake_gcs

# Through jax.config, not XLA_FLAGS, which processes that a test starts would inherit.
jax.config.update("jax_num_cpu_devices", 8)
os.environ["XLA_FLAGS"] = COMPILER_FLAGS

# Tests compile many small programs, most of them several times: here and in processes that they start, without most
# optimizations of LLVM (TPU programs are the same without), and once for all workers.
QUICKLY = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": compilation_cache(),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in QUICKLY.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)

# The same examples at every run, so that failures reproduce. `make test-slow` tries more, at random.
settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("random", max_examples=200, deadline=None)
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    """Runs tests that need the demo first: making it takes long, and no worker should be left with it at the end.

    Tests that need the machine for themselves are slow ones.
    """
    for item in items:
        if item.get_closest_marker("alone"):
            item.add_marker("slow")
    items.sort(key=lambda item: "demo" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish():
    """Hides what lives to the end, modules and tests, from garbage collection, which would go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> pathlib.Path:
    """A finished tiny demo."""
    out = tmp_path_factory.mktemp("demo")
    output = run("scripts.demo", *TINY_DEMO, f"--out={out}")
    assert output.strip().splitlines()[-1] == str(out / "index.html")
    return out


@pytest.fixture
def no_file_locks(monkeypatch):
    """A function that makes every `flock` of this process fail with an error number."""

    def fail_with(code: int) -> None:
        def flock(file, operation):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", flock)

    return fail_with


_SHARED = {"demo", "reference"}  # outputs that tests compare with to the bit


@pytest.fixture(autouse=True)
def optimized_if_slow(request, monkeypatch):
    """Slow tests compute more than they compile; those that use what other tests use, too, must round as it did."""
    option = "jax_disable_most_optimizations"
    if request.node.get_closest_marker("slow") and not _SHARED & set(request.fixturenames):
        monkeypatch.setenv(option.upper(), "False")
        jax.config.update(option, False)
    yield
    jax.config.update(option, QUICKLY[option])


@pytest.fixture
def gcs():
    """The path of an empty bucket on gs://, of a server on this machine."""
    with fake_gcs() as bucket:
        yield bucket
