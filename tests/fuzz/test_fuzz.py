"""A short fuzz run: the same few cases of every domain every time; `make fuzz` is the long one.

A failing case is printed; ``python scripts/fuzz.py --domain D --case 'CASE'`` repeats it.
"""

import json
import tempfile
from pathlib import Path

import pytest
from fuzz_forks import Forks
from hypothesis import given
from script_loading import loaded

pytestmark = pytest.mark.e2e
with loaded("scripts/fuzz.py") as fuzz:
    DOMAINS = fuzz.DOMAINS


@pytest.fixture(scope="module")
def forks():
    with Forks() as server:
        yield server


@pytest.mark.parametrize("name", DOMAINS)
def test_a_few_cases(forks, name):
    domain = DOMAINS[name]

    @fuzz.settings(domain.SHORT, derandomize=True)
    @given(domain.cases)
    def every_case_ends_well(case):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
            domain.check(json.loads(json.dumps(case)), Path(place), forks)

    every_case_ends_well()
