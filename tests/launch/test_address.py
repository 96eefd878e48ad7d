"""Which clusters may be joined without a token, also where Ray finds the address itself."""

import socket
from pathlib import Path

import pytest
import ray._private.services as ray_services
from ray._private.services import get_node_ip_address

from configs.cluster import ClusterConfig
from configs.load import load_recipe
from launch import submit
from launch.address import answers, is_loopback, listens_elsewhere, refuse_unguarded
from launch.cluster import connect
from launch.joining import check_door
from launch.supervisor import head_address

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


BAD = ["foo:bar", "10.0.0.1:99999", "::1:6379", "[::1:6379", "10.0.0.1", "host:0", "ray://h:1", ""]


@pytest.mark.parametrize("address", BAD)
def test_what_is_no_address_is_named_with_its_mend(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cluster\.address.*such as 10\.0\.0\.1:6379") as error:
        load_recipe("quickstart", [f"cluster.address='{address}'"])
    assert f"{address!r} must be HOST:PORT" in str(error.value)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=r"^RAY_ADDRESS='.*' must be HOST:PORT"):
            check_door("auto")
        assert head_address("auto") is None and not answers(address)


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://h:bar", "h:99999", "h:0", "http://:8265"]
)
def test_what_is_no_job_server_is_named_with_its_mend(address: str) -> None:
    with pytest.raises(ValueError, match=r"--address='.*' must be the job server's http://HOST"):
        submit.start(load_recipe("quickstart"), address)


def test_loopback_is_no_excuse_for_what_others_reach_as_well() -> None:
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token ray start --head"):
        refuse_unguarded("127.0.0.1:6379", "cluster.address", lambda _: True)
    refuse_unguarded("127.0.0.1:6379", "cluster.address", lambda _: False)
    networked = not is_loopback(get_node_ip_address())
    for host, elsewhere in (("127.0.0.1", False), ("0.0.0.0", networked)):
        with socket.create_server((host, 0)) as server:
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            assert listens_elsewhere(address) is elsewhere


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
