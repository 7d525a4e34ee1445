"""The SuperLink with its control port closed to whoever does not hold the deployment's secret.

Who reaches Flower's control API has an app of his own run as the server's user, and a port on loopback is reached by
every user of the host. Flower 1.39 authenticates the users of that API through a plugin. Its free distribution holds
the client's half of one, a bearer token that every ``flwr`` command sends, and at the SuperLink a plugin that lets
everybody in. This module is the other half (docs/decisions/0010-whom-a-node-trusts.md). It is run as
``flower-superlink`` is, with the same options, and with the secret's file in ``CG_FEDLLM_CONTROL_SECRET``.
"""

from __future__ import annotations

import hmac
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.logger import update_console_handler
from flwr.superlink.auth_plugin import ControlAuthnPlugin

from server.host.launch import SECRET_VARIABLE


class SecretPlugin(ControlAuthnPlugin):
    """Lets in whoever sends the secret; all of them are the one account of a SuperLink without accounts."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Nobody logs in: the secret lies in the deployment's folder."""
        return None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """As ``get_login_details``."""
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Whether the secret is among what a request sent, and the account that it is then made for."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        if not hmac.compare_digest(given if isinstance(given, bytes) else given.encode(), self._secret):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """The secret does not expire, so nothing is refreshed."""
        return None, None


def main() -> None:
    secret = Path(os.environ[SECRET_VARIABLE]).read_text().strip()
    if len(secret) < 32:
        sys.exit(f"error: {os.environ[SECRET_VARIABLE]} holds no secret: remove it and start the server again")
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")  # its package has a function of that name
    assert hasattr(program, "load_control_authn_plugin"), "another release of Flower: its control port would be open"
    setattr(program, "load_control_authn_plugin", lambda: SecretPlugin(secret))  # noqa: B010
    update_console_handler(timestamps=True, colored=False)
    program.flower_superlink()


if __name__ == "__main__":
    main()
