"""Keys from a file: who a caller is, what it may do, and every way in which a file is wrong."""

import hashlib
import os
from pathlib import Path

import pytest

from jserve.core.errors import ConfigError
from jserve.core.secret import Secret
from jserve.gateway.api_keys import ApiKeys, KeyGrant
from jserve.gateway.config import GatewayConfig

DIGEST = hashlib.sha256(b"hashed-key").hexdigest()
FILE = f"""
[keys.team-a]
key = "plain-key"
priority = true
max_slots = 4

[keys.team-b]
sha256 = "{DIGEST}"

[keys."the operators"]
key = "schlüssel"
admin = true
"""


def key_file(folder: Path, text: str = FILE, mode: int = 0o600) -> str:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_key_of_the_file_is_found_with_its_name_and_rights(tmp_path):
    keys = ApiKeys.from_config(GatewayConfig(api_keys_file=key_file(tmp_path)))
    expected = KeyGrant(name="team-a", priority=True, max_slots=4, admin=False)
    assert keys.find("Bearer plain-key") == keys.find(b"bearer  plain-key ") == expected
    assert keys.find("Bearer hashed-key") == KeyGrant(name="team-b")
    assert keys.find("Bearer schlüssel".encode()) == KeyGrant(name="the operators", admin=True)
    assert keys.find_in([("x", "y"), ("authorization", "Bearer hashed-key")]) is not None
    for wrong in ("", "Bearer", "Bearer ", "plain-key", "Basic plain-key", f"Bearer {DIGEST}"):
        assert keys.find(wrong) is None
    assert keys.find_in([]) is None


def test_each_key_has_a_salt_that_no_other_key_gets_later(tmp_path):
    def salt(key: str, **config) -> str:
        grant = ApiKeys.from_config(GatewayConfig(**config)).find(f"Bearer {key}")
        assert grant is not None
        return grant.caller().cache_salt

    path = key_file(tmp_path)
    named = [salt(key, api_keys_file=path) for key in ("plain-key", "hashed-key")]
    assert named == ["tenant:key team-a", "tenant:key team-b"]
    one, two = (salt(key, api_keys=("one", "two")) for key in ("one", "two"))
    assert one != two
    # A list in another order, or without a key that was withdrawn, is read at the next start.
    assert (salt("one", api_keys=("two", "one")), salt("two", api_keys=("two",))) == (one, two)
    digest = hashlib.sha256(b"one").hexdigest()
    assert one == f"tenant:sha256 {digest}"


def test_keys_of_the_config_join_those_of_the_file(tmp_path):
    path = key_file(tmp_path, mode=0o400)
    config = GatewayConfig(api_keys=("first", "plain-key"), api_keys_file=path)
    keys = ApiKeys.from_config(config)
    first = keys.find("Bearer first")
    assert first is not None
    assert (first.name, first.priority, first.max_slots, first.admin) == (
        "key-1",
        False,
        None,
        False,
    )
    found = keys.find("Bearer plain-key")
    assert found is not None
    assert (found.name, found.priority) == ("team-a", True)
    assert "plain-key" not in repr(config) + str(vars(keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"one table \[keys\.NAME\] for each key"),
        ("keys = 3", r"one table \[keys\.NAME\]"),
        ("[keys]", r"one table \[keys\.NAME\]"),
        (FILE + "\n[other]\nx = 1", "and nothing else"),
        ("[keys]\na = 'topsecret'", r"keys\.a must be a table"),
        ("[keys.a]\nadmin = true", r"keys\.a needs one of key and sha256"),
        (f"[keys.a]\nkey = 'topsecret'\nsha256 = '{DIGEST}'", "needs one of key and sha256"),
        ("[keys.a]\nkey = ''", r"keys\.a\.key: a key is empty"),
        ('[keys.a]\nkey = " \\t"', r"keys\.a\.key: a key is empty"),
        ("[keys.a]\nkey = 'topsecret '", r"keys\.a\.key: a key begins or ends with a space"),
        ('[keys.a]\nkey = "top\\nsecret"', "control characters"),
        ("[keys.a]\nkey = 5", r"keys\.a\.key must be text"),
        ("[keys.a]\nsha256 = 'topsecret'", "sha256 must be 64 hexadecimal digits"),
        ("[keys.a]\nkey = 'topsecret'\npriority = 1", r"priority must be true or false"),
        ("[keys.a]\nkey = 'topsecret'\nadmin = 'yes'", r"admin must be true or false"),
        ("[keys.a]\nkey = 'topsecret'\nmax_slots = 0", r"max_slots must be a whole number from 1"),
        ("[keys.a]\nkey = 'topsecret'\nmax_slots = true", r"max_slots must be a whole number"),
        ("[keys.a]\nkey = 'topsecret'\nslots = 1", r"no field 'slots'; it has key, sha256"),
        ("[keys.a]\nkey = 'topsecret'\n[keys.b]\nkey = 'topsecret'", "'a' and 'b' are the same"),
        ("[keys.'']\nkey = 'topsecret'", "is no name for a key"),
        ('[keys."a\\n"]\nkey = "topsecret"', "is no name for a key"),
        ("[keys.a]\nkey = topsecret", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_without_the_key(tmp_path, text, message):
    config = GatewayConfig(api_keys_file=key_file(tmp_path, text))
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_config(config)
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o601])
def test_a_file_that_others_reach_is_refused(tmp_path, mode):
    config = GatewayConfig(api_keys_file=key_file(tmp_path, mode=mode))
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        ApiKeys.from_config(config)


def test_a_file_that_is_none_is_refused_at_once(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ApiKeys.from_config(GatewayConfig(api_keys_file=str(path)))

    os.mkfifo(tmp_path / "pipe", 0o600)
    refused(tmp_path / "pipe", "is not a file")
    refused(tmp_path, "cannot be read: Is a directory")
    refused(tmp_path / "nothing", "cannot be read: No such file")
    key_file(tmp_path)
    (tmp_path / "keys.toml").write_bytes(b"\xff")
    refused(tmp_path / "keys.toml", "is not UTF-8")
    (tmp_path / "keys.toml").write_bytes(b"#" * (1 << 21))
    refused(tmp_path / "keys.toml", "is larger than")


@pytest.mark.parametrize("keys", [("",), (" ",), ("a", "\t"), ("a", Secret(""))])
def test_an_empty_key_is_refused(keys):
    with pytest.raises(ConfigError, match="a key is empty"):
        GatewayConfig(api_keys=keys)
    with pytest.raises(ConfigError, match="api_keys_file is empty"):
        GatewayConfig(api_keys_file=" ")


@pytest.mark.parametrize("keys", ["topsecret", ["topsecret"], (b"topsecret",), None])
def test_keys_of_a_wrong_type_are_not_shown(keys):
    with pytest.raises(ConfigError, match=r"api_keys is <secret>, but must be a tuple") as caught:
        GatewayConfig(api_keys=keys)
    assert "topsecret" not in str(caught.value)
