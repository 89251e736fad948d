"""What every test shares: one thread a worker, property tests that draw the same everywhere, sample data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers with a thread a core each would fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if not any(Path("/dev").glob("nvidia[0-9]*")):  # Triton's kernels run in its interpreter, chosen when they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("ostro", derandomize=True, deadline=None, database=None)
settings.load_profile("ostro")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample data and recorded results beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("sample data and recorded results lie in a folder 'shared' beside the checkout; it is not here")
    return folder


# A shell that starts us in the background has SIGINT ignored, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
