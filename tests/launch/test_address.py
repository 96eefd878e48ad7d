"""Which clusters may be joined without a token, also where Ray finds the address itself."""

from pathlib import Path

import pytest
import ray._private.services as ray_services

from configs.cluster import ClusterConfig
from launch.address import is_loopback
from launch.cluster import connect

FOREIGN = "192.0.2.1:6379"  # documentation only: nothing answers there


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1:6379", True),
        ("localhost", True),
        ("[::1]:6379", True),
        ("http://127.0.0.1:8265", True),
        (FOREIGN, False),
        ("ray://192.0.2.1:10001", False),
        ("0.0.0.0:6379", False),
        ("localhost.example.org:6379", False),
    ],
)
def test_loopback(address: str, own: bool) -> None:
    assert is_loopback(address) is own


def refusal(address: str) -> str:
    joined = connect(ClusterConfig(address=address))
    with pytest.raises(ValueError, match="start the cluster with RAY_AUTH_MODE=token") as error:
        joined.__enter__()
    return str(error.value)


def test_an_open_cluster_is_refused_wherever_its_address_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert refusal(FOREIGN).startswith(
        f"cluster.address='{FOREIGN}' is not this machine's loopback"
    )

    monkeypatch.setenv("RAY_ADDRESS", FOREIGN)
    assert refusal("auto").startswith(f"RAY_ADDRESS='{FOREIGN}' is not this")

    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(FOREIGN)
    # Other runs on this host are not the matter here.
    monkeypatch.setattr(ray_services, "find_gcs_addresses", frozenset)
    assert refusal("auto").startswith(f"cluster.address (auto)='{FOREIGN}' is not")

    (tmp_path / "ray" / "ray_current_cluster").unlink()
    joined = connect(ClusterConfig(address="auto"))
    with pytest.raises(ValueError, match="no Ray cluster answers there"):
        joined.__enter__()
