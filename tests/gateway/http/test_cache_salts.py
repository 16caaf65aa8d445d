"""`cache_salt`: whose computed prompts a request may share, over HTTP."""

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.http.http_serving import CHAT, COMPLETIONS, MODEL, Served, error_of, serving

ROUTES = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": [{"role": "user", "content": "x"}]})]
PADDING = "x" * (70 << 10)  # bodies of this size are read in another process


@pytest.fixture(scope="module")
def without_keys() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text('[keys.alice]\nkey = "key-of-alice"\n[keys.bob]\nkey = "key-of-bob"\n')
    path.chmod(0o600)
    with serving(api_keys_file=str(path)) as served:
        yield served


def salts(served: Served, path: str, body: dict[str, Any], key: str = "none") -> list[str]:
    """The salts under which the engine gets the sequences of a request that is accepted."""
    known = len(served.engine.submitted)
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(served.url + path, json=body | {"max_tokens": 1}, headers=headers)
    assert response.status_code == 200, response.text
    return [request.cache_salt for request in served.engine.submitted[known:]]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_without_keys_all_share_unless_they_give_a_salt(
    without_keys: Served, path: str, body: dict[str, Any]
) -> None:
    assert salts(without_keys, path, body) == [""]
    assert salts(without_keys, path, body | {"cache_salt": None}) == [""]
    assert salts(without_keys, path, body | {"cache_salt": "Grüße", "n": 2}) == ["given:Grüße"] * 2
    assert salts(without_keys, path, body | {"cache_salt": "s" * 256}) == ["given:" + "s" * 256]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_tenant_with_a_key_shares_with_itself_only(
    with_keys: Served, path: str, body: dict[str, Any]
) -> None:
    alice = salts(with_keys, path, body, "key-of-alice")
    assert alice == ["tenant:key alice"]
    assert salts(with_keys, path, body, "key-of-bob") == ["tenant:key bob"]
    for guess in ("alice", "key alice", *alice, ""):
        given = body | {"cache_salt": guess or "tenant:"}
        assert salts(with_keys, path, given, "key-of-bob") != alice


def test_a_given_salt_is_shared_across_tenants(with_keys: Served) -> None:
    body = {"prompt": ["a", "b"], "cache_salt": "project x"}
    alice, bob = (salts(with_keys, COMPLETIONS, body, f"key-of-{it}") for it in ("alice", "bob"))
    assert alice == bob == ["given:project x"] * 2


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("salt", ["", "s" * 257, 5, True, ["a"], {"a": "b"}])
def test_a_salt_that_is_none_is_refused_without_showing_it(
    without_keys: Served, path: str, body: dict[str, Any], size: str, salt: object
) -> None:
    known = len(without_keys.engine.submitted)
    body = body | {"cache_salt": salt} | ({"user": PADDING} if size == "large" else {})
    error = error_of(httpx.post(without_keys.url + path, json=body), 400)
    assert error["param"] == "cache_salt"
    assert error["message"] == (
        "cache_salt must be a text of 1 to 256 characters; leave it out for the default"
    )
    assert len(without_keys.engine.submitted) == known


def test_a_salt_of_a_large_body_reaches_the_engine(without_keys: Served) -> None:
    body = {"prompt": "hi", "cache_salt": "large", "user": PADDING}
    assert salts(without_keys, COMPLETIONS, body) == ["given:large"]


def test_the_openai_client_can_give_one(without_keys: Served) -> None:
    with openai.OpenAI(base_url=f"{without_keys.url}/v1", api_key="x", max_retries=0) as client:
        client.completions.create(
            model=MODEL, prompt="hi", max_tokens=1, extra_body={"cache_salt": "mine"}
        )
    assert without_keys.engine.submitted[-1].cache_salt == "given:mine"


def test_no_log_and_no_repr_shows_a_salt(
    without_keys: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    salts(without_keys, COMPLETIONS, {"prompt": "hi", "cache_salt": "s3cr3t-salt"})
    bad = {"prompt": "hi", "cache_salt": "s3cr3t-salt", "temperature": -1}
    error = error_of(httpx.post(without_keys.url + COMPLETIONS, json=bad), 400)
    request = without_keys.engine.submitted[-1]
    assert request.cache_salt == "given:s3cr3t-salt"
    for shown in (caplog.text, repr(request), str(error)):
        assert "s3cr3t" not in shown
