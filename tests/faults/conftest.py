"""The undisturbed training that the disturbed ones are compared with."""

from pathlib import Path

import pytest

from tests.faults.trainings import Course, attempt, course, settings, write_data

EPOCHS = 3


@pytest.fixture(scope="session")
def calm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of three epochs on two ranks leaves."""
    root: Path = tmp_path_factory.mktemp("calm")
    write_data(root)
    return root


@pytest.fixture(scope="session")
def calm(calm_root: Path) -> Course:
    """That run."""
    return course(calm_root, attempt(settings(calm_root, EPOCHS)))
