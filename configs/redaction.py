"""Credentials never reach a dump, a record, a report or a sentence: one place knows their looks."""

import os
import re
from typing import Any, TypeVar

T = TypeVar("T")
HIDDEN = "***"
_WORDS = (
    r"token|secret|secrets|passwd|password|passphrase|credential|credentials|signature|authorization|"
    r"(?:api|access|account|private|session|secret)[-_]?(?:key|token)(?:[-_]?id)?"
)
SECRET_NAME = re.compile(rf"(?:^|[^A-Za-z])(?:{_WORDS}|key|pass|sig)(?:$|[^A-Za-z])", re.IGNORECASE)
"""Of settings, variables and parameters that hold credentials."""
_IN_URL = re.compile(r"(?P<kept>[A-Za-z][\w+.-]*://)[^\s/:@'\"]*:(?!\d+/)[^\s'\"]*@")
_LONE_IN_WEB_URL = re.compile(r"(?P<kept>https?://)[^\s/:@'\"]+@", re.IGNORECASE)
_PARAMETER = re.compile(r"(?P<kept>[?&;](?P<name>[\w.%-]+)=)(?P<value>[^&;\s'\"#]+)")
_ASSIGNED = re.compile(
    rf"(?P<kept>(?<![A-Za-z])(?:{_WORDS})['\"]?\s*[:=]\s*['\"]?(?:(?:Bearer|Basic)\s+)?)"
    r"(?P<value>[^\s'\",;}\)&]{8,})",
    re.IGNORECASE,
)
_PASSWORD = re.compile(
    r"(?P<kept>(?<![A-Za-z])(?:passwd|password|passphrase)['\"]?\s*[:=]\s*['\"]?)"
    r"(?P<value>[^\s'\",;}\)&]+)",
    re.IGNORECASE,
)
"""However short."""
_BEARER = re.compile(r"(?P<kept>\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}")
_SHORTEST = 8
"""Characters of a variable's value that is hidden wherever it stands; shorter ones are words."""


def redacted(value: T) -> T:
    """A text, or JSON-able value, with every credential in it replaced by `***`.

    Found are user names and passwords in URLs, secret parameters of URLs, `name=value` and
    `name: value` of names like `secret_access_key`, header tokens, and the values that this
    process's environment has for such names. Recipes without credentials come back equal.
    """
    result: Any = value
    if isinstance(value, str):
        result = _redacted_text(value)
    elif isinstance(value, dict):
        result = {key: _redacted_entry(key, inner) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(redacted(inner) for inner in value)
    return result


def refuse_credentials(key: str, url: str) -> None:
    """Refuse credentials in a URL that everything of a run is named after.

    Raises:
        ValueError: names the recipe's `key`, and where credentials belong.
    """
    if redacted(url) != url:
        raise ValueError(
            f"{key}={redacted(url)!r} holds credentials, which would stand in every record of the "
            "run: leave them out, and give them where the driver looks, such as AWS_PROFILE or "
            "GOOGLE_APPLICATION_CREDENTIALS in the environment of every node"
        )


def _redacted_entry(key: Any, value: Any) -> Any:
    named = isinstance(key, str) and re.fullmatch(rf"(?:.*[^A-Za-z])?(?:{_WORDS})", key, re.I)
    return HIDDEN if named and isinstance(value, str) and value else redacted(value)


def _redacted_text(text: str) -> str:
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _IN_URL.sub(rf"\g<kept>{HIDDEN}@", text)
    text = _LONE_IN_WEB_URL.sub(rf"\g<kept>{HIDDEN}@", text)
    text = _PARAMETER.sub(_redacted_parameter, text)
    for pattern in (_ASSIGNED, _PASSWORD):
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return _BEARER.sub(rf"\g<kept>{HIDDEN}", text)


def _redacted_parameter(found: re.Match[str]) -> str:
    return found["kept"] + (HIDDEN if SECRET_NAME.search(found["name"]) else found["value"])


def _of_environment() -> list[str]:
    """Values of variables whose names tell of credentials, longest first; paths are none."""
    values = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    secrets = (v for v in values if len(v) >= _SHORTEST and v[0] not in "/~" and " " not in v)
    return sorted(secrets, key=len, reverse=True)
