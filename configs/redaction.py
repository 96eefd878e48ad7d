"""Credentials never reach a dump, a record, a report or a sentence: one place knows their looks."""

import base64
import json
import logging
import os
import re
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

T = TypeVar("T")
HIDDEN = "***"
_START = r"(?:(?<![A-Za-z])|(?-i:(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])))"
"""Of a word in `snake_case`, `kebab-case` or `camelCase`."""
_WORDS = (
    r"token|secret|secrets|credential|credentials|signature|authorization|"
    r"(?:api|access|account|private|session|secret)[-_]?(?:key|token)(?:[-_]?id)?"
)
_PASSWORDS = r"(?:passwd|password|passphrase)"
"""Whatever stands before it, as in PGPASSWORD."""
_SURE = rf"(?:{_START}(?:{_WORDS})|{_PASSWORDS})"
_SCHEMES = r"(?:Bearer|Basic|Token|ApiKey|Digest|Negotiate)"
"""Of an `Authorization` header."""
_NAMED = rf"(?:{_SURE}|{_START}(?:{{words}}))(?:$|[^A-Za-z])"
SECRET_NAME = re.compile(_NAMED.format(words="auth|jwt|key|pass|pat|pwd|sig"), re.IGNORECASE)
"""Of settings, variables and parameters that hold credentials."""
_SURE_NAME = re.compile(_NAMED.format(words="pass|pwd"), re.IGNORECASE)
"""Of variables that hold nothing else; many a `key` is the name of something."""
_SURE_KEY = re.compile(rf"{_SURE}\Z", re.IGNORECASE)
_PATH_NAME = re.compile(r"(?:^PWD|FILE|PATH|DIR|CREDENTIALS)$", re.IGNORECASE)
"""Of variables that say where something lies, which must be seen where nothing lies there."""
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
    rf"(?P<kept>{_SURE}['\"]?\s*[:=]\s*['\"]?(?:{_SCHEMES}\s+)?)"
    r"(?P<value>[^\s'\",;}\)&]{8,})",
    re.IGNORECASE,
)
_PASSWORD = re.compile(
    rf"(?P<kept>{_PASSWORDS}['\"]?\s*[:=]\s*['\"]?)(?P<value>[^\s'\",;}}\)&]+)",
    re.IGNORECASE,
)
"""However short."""
_BEARER = re.compile(r"(?P<kept>\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)",
    re.DOTALL,
)
"""As PEM; one that is cut short is hidden to the end."""
_KNOWN_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|xox[abprs]-[\w-]{10,})"
)
"""Of services whose tokens tell by themselves what they are."""
_SHORTEST = 8
"""Characters of a variable's value that is hidden wherever it stands; shorter ones are words."""


def redacted(value: T) -> T:
    """A text, or JSON-able value, with every credential in it replaced by `***`.

    Found are user names and passwords in URLs, secret parameters of URLs, `name=value` and
    `name: value` of names like `secret_access_key` and `clientSecret`, header tokens, private keys
    in PEM, and the values that this process's environment has for such names. Recipes without
    credentials come back equal.
    """
    result: Any = value
    if isinstance(value, str):
        result = _redacted_text(value)
    elif isinstance(value, dict):
        result = {redacted(key): _redacted_entry(key, inner) for key, inner in value.items()}
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
    named = isinstance(key, str) and _SURE_KEY.search(key)
    return _hidden(value) if named else redacted(value)


def _hidden(value: Any) -> Any:
    """What a name says to be secret, of which only its shape is seen."""
    if isinstance(value, dict):
        return {redacted(key): _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_hidden(inner) for inner in value)
    return value if value is None or value == "" or isinstance(value, bool) else HIDDEN


def _redacted_text(text: str) -> str:
    for secret in _of_environment():
        for form in _forms(secret):
            text = text.replace(form, HIDDEN)
    text = _KNOWN_TOKEN.sub(HIDDEN, _PRIVATE_KEY.sub(HIDDEN, text))
    text = _WORD.sub(_without_users, text)
    text = _LONE_IN_WEB_URL.sub(rf"\g<kept>{HIDDEN}@", text)
    text = _PARAMETER.sub(_redacted_parameter, text)
    for pattern in (_ASSIGNED, _PASSWORD):
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return _BEARER.sub(rf"\g<kept>{HIDDEN}", text)


@lru_cache
def _forms(secret: str) -> tuple[str, ...]:
    """How a value may stand in a text: as it is, in a URL, escaped in JSON or by `repr`, or as the
    base64 of a header's."""
    encoded = base64.b64encode(secret.encode(errors="surrogateescape")).decode()
    forms = (
        secret,
        quote(secret, safe="", errors="surrogateescape"),
        quote_plus(secret, errors="surrogateescape"),
        quote(secret, errors="surrogateescape"),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        encoded,
    )
    return tuple(dict.fromkeys(forms))


def _without_users(word: re.Match[str]) -> str:
    # Up to the last @: a search for one from every `://` behind it would be quadratic.
    before, at, after = word[0].rpartition("@")
    for pattern in (_IN_BUCKET_URL, _IN_URL):
        before = pattern.sub(rf"\g<kept>{HIDDEN}@", before + at).removesuffix(at)
    return before + at + after


def _redacted_parameter(found: re.Match[str]) -> str:
    return found["kept"] + (HIDDEN if SECRET_NAME.search(found["name"]) else found["value"])


def _of_environment() -> dict[str, str]:
    """Value → name of variables whose names tell of credentials, the longest values first."""
    secrets = {v: name for name, v in os.environ.items() if _is_secret(name, v)}
    return {value: secrets[value] for value in sorted(secrets, key=len, reverse=True)}


def _is_secret(name: str, value: str) -> bool:
    """Paths are none; nor are plain words, several ones, or what begins like a path, of some `key`.

    A secret key in base64 may begin like one, and a pass phrase has blanks.
    """
    if len(value) < _SHORTEST or not SECRET_NAME.search(name):
        return False
    rooted = value[0] in "/~"
    if _SURE_NAME.search(name):
        path = rooted and (_PATH_NAME.search(name) or os.path.exists(os.path.expanduser(value)))
        return not path
    return not (rooted or " " in value or _PLAIN_WORDS.fullmatch(value))
