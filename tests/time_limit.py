"""A pytest plugin for a time limit: what has not begun when time is up is skipped.

`FASTCLS_SECONDS=75 pytest -p time_limit`, with this folder on PYTHONPATH. Unlike a killed run it
still tells what has failed.
"""

import os
import time

import pytest

END = time.monotonic() + float(os.environ.get("FASTCLS_SECONDS") or "inf")


def pytest_runtest_setup():
    if time.monotonic() > END:
        pytest.skip("time is up")
