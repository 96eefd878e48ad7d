"""The undisturbed training that the disturbed ones are compared with."""

from pathlib import Path

import pytest

from tests.faults.trainings import Course, attempt, course, settings, write_data

EPOCHS = 3


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Three epochs on two ranks."""
    root: Path = tmp_path_factory.mktemp("calm")
    write_data(root)
    return course(root, attempt(settings(root, EPOCHS)))
