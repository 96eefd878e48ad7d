"""Credentials are hidden wherever they stand, and what is none comes back as it was."""

import json
import time
from pathlib import Path

import pytest

from configs.load import load_recipe, shipped_recipes
from configs.redaction import HIDDEN, redacted, refuse_credentials

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 10, "ghp_" + "aB3" * 12])
def test_tokens_that_tell_what_they_are_are_hidden(token: str) -> None:
    assert redacted(f"could not fetch with {token}.") == f"could not fetch with {HIDDEN}."


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/run cannot be read",
        f"ftp://me:{SECRET}@host/x",
        f"s3://AKIAEXAMPLE:12/{SECRET}@bucket/run",
        f"gs://id:443/{SECRET}@bucket, s3a://id:7/{SECRET}@bucket",
        f"Authorization: token {SECRET}",
        f"https://{SECRET.replace('/', '')}@github.com/x",
        f"https://host/data.csv?sv=1&sig={SECRET}&x=2",
        f"https://host/data.csv?auth={SECRET}",
        f"https://host/data.csv?x=2&jwt={SECRET}",
        f"https://b.s3.amazonaws.com/k?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
        f"https://host/x?api_key={SECRET}",
        f"aws_secret_access_key={SECRET}",
        f"{{'secret': '{SECRET}', 'anon': False}}",
        f'{{"aws_session_token": "{SECRET}"}}',
        f"Authorization: Bearer {SECRET}",
        f"'Authorization': 'Basic {SECRET}'",
        f"account_key = {SECRET}",
        f"passphrase={SECRET}",
        f"https://h/log.csv?clientSecret={SECRET}",
        f"https://h/?AWSAccessKeyId={SECRET}",
        f"refreshToken={SECRET}",
        f'{{"idToken": "{SECRET}"}}',
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\nx\n-----END RSA PRIVATE KEY-----\n",
        f'{{"private_key": "-----BEGIN PRIVATE KEY-----\\n{SECRET}\\nx"}}',
        f"ftp://alice:p@{SECRET}@host/x",
    ],
)
def test_credentials_are_hidden(text: str) -> None:
    shown = redacted(text)
    assert SECRET not in shown and SECRET.replace("/", "") not in shown and "***" in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "word",
    ["x", "a.", "://", "password", "?a=", "aB", "idToken", "-----BEGIN PRIVATE KEY-----", "?aB="],
)
def test_a_long_text_takes_no_longer_than_its_length(word: str) -> None:
    started = time.process_time()
    redacted(word * 20_000)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("text", ["password: hunter2", "password='abc'", "passwd=x"])
def test_a_short_password_is_hidden(text: str) -> None:
    assert redacted(text).rstrip("'").endswith("***")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/run/data",
        "abfs://container@account.dfs.core.windows.net/run",
        "ssh://user@host/x",
        "http://127.0.0.1:8265/x@y",
        "data.loader.token_budget=16384",
        "data.loader.tokens_per_micro_batch: 16384000",
        "https://host/x?max_tokens=10000000&maxTokens=10000000&theSecretary=somebody",
        "tokenCount=10000000",
        "-----BEGIN CERTIFICATE-----\nabcdefghijkl\n-----END CERTIFICATE-----",
        "tokenizer: residual_kmeans",
        "put the cluster's token into /root/.ray/auth_token (mode 0600)",
        "RAY_AUTH_MODE=token",
        "https://host/x?version=2&name=secretary",
        "a key: 'data.source.columns.user'",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert redacted(text) == text


def test_whatever_stands_under_a_secret_name_is_hidden_and_names_are_texts_too() -> None:
    told = {
        "password": 123456,
        "tokens": 7,
        "secret": [SECRET, {"value": "short", "since": None, "set": True}],
        f"https://u:{SECRET}@h/": 1,
    }
    assert redacted(told) == {
        "password": "***",
        "tokens": 7,
        "secret": ["***", {"value": "***", "since": None, "set": True}],
        "https://***@h/": 1,
    }


def test_nested_values_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {
        "url": f"s3://a:{SECRET}@b",
        "storage_options": {"secret": SECRET, "key": "x", "client_kwargs": {"token": "short"}},
        "rows": [1, None, ("x", f"x?sig={SECRET}")],
    }
    assert SECRET not in json.dumps(redacted(value)) and "short" not in json.dumps(redacted(value))
    monkeypatch.setenv("MY_ACCESS_KEY", "correcthorsebattery")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/root/.aws/credentials")
    told = redacted("the store says correcthorsebattery is no key; see /root/.aws/credentials")
    assert told == "the store says *** is no key; see /root/.aws/credentials"


@pytest.mark.parametrize("name", ["PGPASSWORD", "MYSQL_PWD", "DB_PASS", "HF_TOKEN", "STRIPE_KEY"])
def test_values_of_such_variables_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter2hunter2")
    assert redacted("the server says hunter2hunter2 is wrong") == "the server says *** is wrong"
    assert redacted("ssh_pgpassword: abc") == "ssh_pgpassword: ***"
    monkeypatch.setenv("PWD", "/home/me/password")
    assert redacted("in /home/me/password") == "in /home/me/password"


@pytest.mark.parametrize(
    "text",
    [
        "GET /x?k=Zx9%2Bab%2Fcd%22e12345",
        "GET /Zx9%2Bab/cd%22e12345",
        '{"key": "Zx9+ab/cd\\"e12345"}',
        "Basic line: Wng5K2FiL2NkImUxMjM0NQ==",
    ],
)
def test_values_are_hidden_however_they_are_written(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redacted(text) == text
    monkeypatch.setenv("MY_API_KEY", 'Zx9+ab/cd"e12345')
    assert "12345" not in redacted(text) and "MTIz" not in redacted(text)
    assert HIDDEN in redacted(text)


def test_a_secret_that_looks_like_a_path_or_like_words_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "AWS_SECRET_ACCESS_KEY": "/7MDENGbPxRfiCYEXAMPLEKEY+x",
        "DB_PASSWORD": "correct horse battery",
        "GITHUB_PAT": "ghp_abcdefghij0123456789",
    }
    paths = {
        "GOOGLE_APPLICATION_CREDENTIALS": "/none/there.json",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/none/token",
        "PWD": "/none/password",
        "RAY_TOKEN": str(tmp_path),  # it is one
        "SORT_KEY": "the name of it",
    }
    for name, value in (values | paths).items():
        monkeypatch.setenv(name, value)
        found = value if name in paths else "***"
        assert redacted(f"told {value} by it") == f"told {found} by it"


def test_a_word_that_some_key_names_is_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", "movielens")
    assert redacted("runs/movielens") == "runs/movielens"
    refuse_credentials("output", "runs/movielens")
    monkeypatch.setenv("CACHE_KEY", "movielens-20m")  # might be one: the sentence tells why
    with pytest.raises(ValueError, match=r"output='runs/\*\*\*' contains the value of CACHE_KEY"):
        refuse_credentials("output", "runs/movielens-20m")
    monkeypatch.setenv("CACHE_KEY", "movielens")
    monkeypatch.setenv("DB_PASSWORD", "movielens")
    with pytest.raises(ValueError, match="the value of DB_PASSWORD in .* or rename DB_PASSWORD"):
        refuse_credentials("output", "runs/movielens")


def test_shipped_recipes_hold_none() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name).recipe.model_dump(mode="json")
        assert redacted(recipe) == recipe
        refuse_credentials("output", recipe["output"])


def test_an_output_with_credentials_is_refused_without_telling_them() -> None:
    with pytest.raises(ValueError, match=r"output='s3://\*\*\*@bucket/run' holds cred") as error:
        refuse_credentials("output", f"s3://AKIA:{SECRET}@bucket/run")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("text", ["a://b:" * 30_000, "https://" * 30_000, "a" * 300_000])
def test_texts_without_credentials_that_look_like_many_are_read_once(text: str) -> None:
    assert redacted(text) == text  # minutes, where each `://` looked for its own @


def test_credentials_of_any_length_are_hidden_up_to_the_last_at() -> None:
    assert redacted(f"s3://u:{'p' * 9_000}@q@host/x 'gs://v:w@b'") == "s3://***@host/x 'gs://***@b'"
