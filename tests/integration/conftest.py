"""Fixtures of the tests of the baselines."""

import pytest


@pytest.fixture
def in_place(place, monkeypatch):
    """Make the test's directory the current one."""
    monkeypatch.chdir(place)


@pytest.fixture
def trainers(monkeypatch):
    """Collects the transformers trainers that runs create."""
    from estune.baselines import policy_gradient, rejection

    made = []
    drive = policy_gradient.drive

    def spied(session, make):
        def kept(driver):
            made.append(make(driver))
            return made[-1]

        return drive(session, kept)

    monkeypatch.setattr(policy_gradient, "drive", spied)
    monkeypatch.setattr(rejection, "drive", spied)
    return made


@pytest.fixture
def batches(monkeypatch):
    """Collects (rows, completions (B, G), rewards (B, G)) of each batch that runs score."""
    from estune.baselines.session import BaselineSession

    seen = []
    score = BaselineSession.score

    def spied(self, row_ids, completions):
        seen.append((list(row_ids), completions, score(self, row_ids, completions)))
        return seen[-1][2]

    monkeypatch.setattr(BaselineSession, "score", spied)
    return seen
