"""Nobody opens a server by accident: keys from the environment, hosts that others reach."""

import dataclasses
import logging
from pathlib import Path

import pytest

from jserve.config import load
from jserve.core.errors import ConfigError
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.config import GatewayConfig
from jserve.launch.exposure import check_exposure, warn_of_keys_in, with_keys_of
from jserve.launch.serve import _log_config  # type: ignore[attr-defined]

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_random.py")


def test_keys_of_the_environment_are_read_and_taken_out_of_it() -> None:
    environment = {"JSERVE_API_KEYS": " one, zwei-ü\n", "HOME": "/root"}
    config = with_keys_of(environment, load(TINY, ["gateway.api_keys=zero"]))
    assert environment == {"HOME": "/root"}
    keys = ApiKeys.from_config(config.gateway)
    for key in ("zero", "one", "zwei-ü"):
        assert keys.find(f"Bearer {key}")
    assert not keys.find("Bearer ")
    assert with_keys_of({}, config) is config


@pytest.mark.parametrize("value", ["", " ", ",", "a,", "a,,b", "\n"])
def test_an_empty_key_in_the_environment_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="JSERVE_API_KEYS: a key is empty"):
        with_keys_of({"JSERVE_API_KEYS": value}, load(TINY))


@pytest.mark.parametrize(
    "value", ["", " ", ",", "a,", "a,,b", "''", "('',)", "(a,,b)", "[' ']", "(,)"]
)
def test_an_empty_key_that_is_set_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="a key is empty"):
        load(TINY, [f"gateway.api_keys={value}"])


def test_keys_are_set_with_and_without_the_signs_of_a_tuple() -> None:
    for value in ("a,b", "(a, b)", "('a', \"b\",)", "[a,b]"):
        assert load(TINY, [f"gateway.api_keys={value}"]).gateway.api_keys == ("a", "b")
    assert load(TINY, ["gateway.api_keys=()"]).gateway.api_keys == ()


def test_no_message_of_the_config_shows_a_key(tmp_path: Path) -> None:
    for wrong in (
        "gateway.api_keys topsecret",
        "gateway.api_keys:topsecret",
        "gateway.api_keys=topsecret,",
    ):
        with pytest.raises(ConfigError, match=r"gateway\.api_keys") as caught:
            load(TINY, [wrong])
        assert "topsecret" not in str(caught.value)
    path = tmp_path / "config.py"
    path.write_text(
        "from jserve.gateway.config import GatewayConfig\n"
        "def get_config(): return GatewayConfig(api_keys='topsecret')\n"
    )
    with pytest.raises(ConfigError, match=rf"{path}:2: gateway\.api_keys is <secret>") as caught:
        load(str(path))
    assert "topsecret" not in str(caught.value)


def test_the_logged_config_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _log_config(load(TINY, ["gateway.api_keys=topsecret,b"]))
        warn_of_keys_in(["engine.num_slots=4", "gateway.api_keys=topsecret"])
        warn_of_keys_in(["gateway.api_keys_file=x"])
    config, warning = caplog.records
    assert repr(vars(config)["gateway.api_keys"]) == "(<secret>, <secret>)"
    assert "every user of this machine" in warning.getMessage()
    assert "topsecret" not in repr([vars(record) for record in caplog.records])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "gateway.example"])
def test_an_address_that_others_reach_needs_keys_or_a_word(host: str, tmp_path: Path) -> None:
    config = GatewayConfig(host=host)
    with pytest.raises(ConfigError, match=r"no key.*gateway\.open=true"):
        check_exposure(config)
    check_exposure(dataclasses.replace(config, open=True))
    check_exposure(dataclasses.replace(config, api_keys=("k",)))
    file = tmp_path / "keys.toml"
    file.write_text("[keys.a]\nkey = 'k'\n")
    file.chmod(0o600)
    check_exposure(dataclasses.replace(config, api_keys_file=str(file)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_a_loopback_address_needs_no_keys(host: str) -> None:
    check_exposure(GatewayConfig(host=host))


def test_tls_is_set_a_field_at_a_time() -> None:
    config = load(TINY, ["gateway.tls_cert=/c.pem", "gateway.tls_key=/k.pem"]).gateway
    with pytest.raises(ConfigError, match=r"/c\.pem.*No such file"):
        check_exposure(config)
    with pytest.raises(ConfigError, match="need each other"):
        check_exposure(dataclasses.replace(config, tls_key=None))


def test_a_file_of_keys_that_cannot_be_read_is_found_before_the_start() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_exposure(GatewayConfig(api_keys_file="/nothing.toml"))
