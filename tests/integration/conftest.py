"""What the integration tests share."""

from pathlib import Path

import pytest

from tests.integration.jobs import finish, start, write_recipe


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run of every stage on one node, and what it printed."""
    directory = tmp_path_factory.mktemp("calm")
    output = finish(start("run", str(write_recipe(directory))))
    return directory, output
