"""Which Ray addresses may be talked to, and the token that protects them."""

import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from configs.cluster import split_address
from launch.user_errors import BusyError

PROBE_S = 5.0
GUARD_S = 30.0
"""How long a busy head may take to say whether it asks for a token."""


def is_loopback(address: str) -> bool:
    """Whether `host`, `host:port` or `scheme://host:port` is this machine's own loopback."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open(address: str, what: str) -> None:
    """Refuse an address beyond loopback without token authentication.

    Whoever reaches an unprotected Ray port can run code on the cluster (CVE-2026-27482).

    Args:
        address: as for `is_loopback`.
        what: the setting that names it, for the message.

    Raises:
        ValueError: one sentence with the mend.
    """
    if is_loopback(address) or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    raise ValueError(
        f"{what}={address!r} is not this machine's loopback and RAY_AUTH_MODE is not 'token', so "
        "anyone who reaches that port could run code: start the cluster with RAY_AUTH_MODE=token "
        "and set it here, too"
    )


def refuse_unguarded(address: str, what: str, lets_in: Callable[[str], bool]) -> None:
    """Refuse what does not prove that it asks for a token, whatever is set here.

    Also on loopback: a Ray head listens on every address of its machine, by which others come.

    Args:
        address: as for `is_loopback`.
        what: the setting that names it, for the message.
        lets_in: whether what answers there does what it is asked without a token; raises
            ConnectionError where it says neither, TimeoutError where it says nothing in time.

    Raises:
        ValueError: one sentence with the mend.
        BusyError: it did not answer in time.
    """
    unknown = f"{what}={address!r}: whether what answers there asks for a token cannot be told"
    try:
        open_to_all = lets_in(address)
    except TimeoutError as error:
        raise BusyError(
            f"{unknown}, as it says nothing within {GUARD_S:g} s: it is busy or hangs; run the "
            "same command again once it answers"
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"{unknown} ({error}): give the address of a Ray head that is well, which no proxy "
            "answers for"
        ) from error
    if open_to_all:
        raise ValueError(
            f"{what}={address!r} asks for no token, so anyone who reaches its machine can run code "
            "there: start the cluster anew (`ray stop`, then `RAY_AUTH_MODE=token ray start "
            f"--head`), with that on all its nodes and the same token in {token_file()} there and "
            "here"
        )


def listens_elsewhere(address: str) -> bool:
    """Whether what answers at an address of this machine's loopback answers at others of it."""
    place = urlsplit(address if "://" in address else f"//{address}")
    port = place.port or (443 if place.scheme == "https" else 80)
    own = [
        each.address
        for link in psutil.net_if_addrs().values()
        for each in link
        if each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address
    ]
    return any(
        answers(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        for host in own
        if not ipaddress.ip_address(host).is_loopback
    )


def token_file() -> Path:
    """Where Ray keeps the token of this user."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def token_is_exposed() -> bool:
    """Whether other users of this machine may read the token."""
    path = token_file()
    return path.exists() and bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def protect_token() -> None:
    """Take the token away from other users; Ray creates it readable by all.

    Raises:
        ValueError: the file cannot be changed: it is another user's, or mounted read-only.
    """
    if not token_is_exposed():
        return
    try:
        token_file().chmod(0o600)
    except OSError as error:
        raise ValueError(
            f"Ray's token {token_file()} can be read by other users, and its mode cannot be "
            f"changed ({error.strerror}): mount it with mode 0400, or copy it to a file of mode "
            "0600 that RAY_AUTH_TOKEN_PATH names"
        ) from error


def answers(address: str) -> bool:
    """Whether something listens at `host:port`."""
    try:
        with socket.create_connection(split_address(address), timeout=PROBE_S):
            return True
    except (OSError, ValueError):
        return False


def make_token() -> None:
    """Make the token of this user, if there is none, before Ray does and others could read it.

    Raises:
        ValueError: there is none, and none can be written.
    """
    path = token_file()
    try:
        if not path.exists() and not os.environ.get("RAY_AUTH_TOKEN"):
            _write_token(path)
    except OSError as error:
        raise ValueError(
            f"no token for Ray can be made at {path} ({error.strerror}): name a file in a "
            "directory that can be written by RAY_AUTH_TOKEN_PATH"
        ) from error


def _write_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(32))
        os.link(draft, path)  # whole or not at all, whoever else makes one now
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def refuse_open_embedded() -> None:
    """Refuse to start a Ray without token authentication: every user of the host reaches it.

    Raises:
        ValueError: one sentence with the mend.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ValueError(
            f"RAY_AUTH_MODE={mode!r} would let anyone who is on this machine run code in the "
            "embedded Ray: unset it, or set it to token"
        )
