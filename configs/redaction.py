"""Credentials never reach a dump, a record, a report or a sentence: one place knows their looks."""

import logging
import os
import re
from typing import Any, TypeVar

T = TypeVar("T")
HIDDEN = "***"
_WORDS = (
    r"token|secret|secrets|[a-z]*(?:passwd|password|passphrase)|credential|credentials|signature|"
    r"authorization|"
    r"(?:api|access|account|private|session|secret)[-_]?(?:key|token)(?:[-_]?id)?"
)
_SCHEMES = r"(?:Bearer|Basic|Token|ApiKey|Digest|Negotiate)"
"""Of an `Authorization` header."""
_NAMED = r"(?:^|[^A-Za-z])(?:{words})(?:$|[^A-Za-z])"
SECRET_NAME = re.compile(_NAMED.format(words=rf"{_WORDS}|key|pass|pwd|sig"), re.IGNORECASE)
"""Of settings, variables and parameters that hold credentials."""
_SURE_NAME = re.compile(_NAMED.format(words=rf"{_WORDS}|pass|pwd"), re.IGNORECASE)
"""Of variables that hold nothing else; many a `key` is the name of something."""
_PLAIN_WORDS = re.compile(r"[A-Za-z]+(?:[-_.][A-Za-z]+)*")
_WORD = re.compile(r"[^\s'\"]+")
_IN_URL = re.compile(r"(?P<kept>[A-Za-z][\w+.-]{0,30}://)[^\s/:@'\"]*:(?!\d+/)[^\s'\"]*@")
_IN_BUCKET_URL = re.compile(
    r"(?P<kept>\b(?:s3[an]?|gc?s|oss|cosn?|r2|b2|adl|az|abfss?|wasbs?)://)[^\s/:@'\"]*:[^\s'\"]*@",
    re.IGNORECASE,
)
"""Of stores whose addresses have no port, so that what looks like one begins a secret key."""
_LONE_IN_WEB_URL = re.compile(r"(?P<kept>https?://)[^\s/:@'\"]+@", re.IGNORECASE)
_PARAMETER = re.compile(r"(?P<kept>[?&;](?P<name>[\w.%-]+)=)(?P<value>[^&;\s'\"#]+)")
_ASSIGNED = re.compile(
    rf"(?P<kept>(?<![A-Za-z])(?:{_WORDS})['\"]?\s*[:=]\s*['\"]?(?:{_SCHEMES}\s+)?)"
    r"(?P<value>[^\s'\",;}\)&]{8,})",
    re.IGNORECASE,
)
_PASSWORD = re.compile(
    r"(?P<kept>(?<![A-Za-z])[a-z]*(?:passwd|password|passphrase)['\"]?\s*[:=]\s*['\"]?)"
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


def hide_in_logs() -> None:
    """Hide credentials in what this process logs from now on, its libraries' lines and tracebacks,
    too; for the start of a command and of a worker."""
    make, formatter = logging.getLogRecordFactory(), logging.Formatter()

    def make_redacted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            record.msg, record.args = redacted(record.getMessage()), ()
        except (TypeError, ValueError, KeyError):  # not as its format wants: logging tells of it
            return record
        if record.exc_info:
            record.exc_text = redacted(formatter.formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(make_redacted)


def refuse_credentials(key: str, url: str) -> None:
    """Refuse credentials in a URL that everything of a run is named after.

    Raises:
        ValueError: names the recipe's `key`, and where credentials belong; or the variable of the
            environment whose value it contains.
    """
    name = variable_in(url)
    if name is not None:
        raise ValueError(
            f"{key}={redacted(url)!r} contains the value of {name} in this environment, which is "
            "hidden wherever it stands, as that name tells of a credential: leave it out; if it is "
            f"none, choose another `{key}`, or unset or rename {name}"
        )
    if redacted(url) != url:
        raise ValueError(
            f"{key}={redacted(url)!r} holds credentials, which would stand in every record of the "
            "run: leave them out, and give them where the driver looks, such as AWS_PROFILE or "
            "GOOGLE_APPLICATION_CREDENTIALS in the environment of every node"
        )


def variable_in(text: str) -> str | None:
    """The variable of this environment whose value `redacted` hides in a text, if there is one."""
    return next((name for value, name in _of_environment().items() if value in text), None)


def _redacted_entry(key: Any, value: Any) -> Any:
    named = isinstance(key, str) and re.fullmatch(rf"(?:.*[^A-Za-z])?(?:{_WORDS})", key, re.I)
    return HIDDEN if named and isinstance(value, str) and value else redacted(value)


def _redacted_text(text: str) -> str:
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _WORD.sub(_without_users, text)
    text = _LONE_IN_WEB_URL.sub(rf"\g<kept>{HIDDEN}@", text)
    text = _PARAMETER.sub(_redacted_parameter, text)
    for pattern in (_ASSIGNED, _PASSWORD):
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return _BEARER.sub(rf"\g<kept>{HIDDEN}", text)


def _without_users(word: re.Match[str]) -> str:
    # Up to the last @: a search for one from every `://` behind it would be quadratic.
    before, at, after = word[0].rpartition("@")
    for pattern in (_IN_BUCKET_URL, _IN_URL):
        before = pattern.sub(rf"\g<kept>{HIDDEN}@", before + at).removesuffix(at)
    return before + at + after


def _redacted_parameter(found: re.Match[str]) -> str:
    return found["kept"] + (HIDDEN if SECRET_NAME.search(found["name"]) else found["value"])


def _of_environment() -> dict[str, str]:
    """Value → name of variables whose names tell of credentials, the longest values first.

    Paths are none; nor are plain words that some `key` names.
    """
    secrets = {v: name for name, v in os.environ.items() if _is_secret(name, v)}
    return {value: secrets[value] for value in sorted(secrets, key=len, reverse=True)}


def _is_secret(name: str, value: str) -> bool:
    if len(value) < _SHORTEST or value[0] in "/~" or " " in value or not SECRET_NAME.search(name):
        return False
    return bool(_SURE_NAME.search(name)) or not _PLAIN_WORDS.fullmatch(value)
