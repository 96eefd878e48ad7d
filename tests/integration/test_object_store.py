"""The job on a store of objects: data, tables, checkpoints and results all lie there."""

from pathlib import Path

import pytest
import yaml

from configs import storage
from tests.integration.jobs import ROOT, finish, start, write_recipe
from tests.object_store import bucket


@pytest.mark.slow
def test_a_run_needs_no_file_system(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import fsspec\nfrom tests.object_store import ObjectStore\n"
        "fsspec.register_implementation('objects', ObjectStore, clobber=True)\n"
    )
    output = bucket(tmp_path / "bucket")
    path = write_recipe(tmp_path, alignment=None, output=output, cluster={"num_workers": 1})
    recipe = yaml.safe_load(path.read_text())
    recipe["training"] = {"epochs": 1, "log_every_steps": 1, "checkpoint": {"every_steps": 3}}
    path.write_text(yaml.safe_dump(recipe))
    variables = {"PYTHONPATH": f"{ROOT}:{site}", "OBJECT_STORE_BREAKS": "300"}
    printed = finish(start("run", str(path), variables=variables))
    assert "report: objects://" in printed
    results = storage.read_sealed(storage.join(output, "results.json"))
    assert set(results["models"]) == {"popularity", "pretrained"}
    again = finish(start("run", str(path), variables=variables))
    assert again.count("unchanged, skipped") == 5, again
