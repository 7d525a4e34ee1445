"""The settings of a run's privacy, and their checks. Loads neither torch nor an accountant."""

from __future__ import annotations

from dataclasses import dataclass

from privacy.errors import PrivacyError

NAMES = ("none", "client_dp", "record_dp")
NOISES = ("local", "sum")
ACCOUNTANTS = ("pld", "rdp")
MAX_LEVELS = 255
MIN_CLIENTS = 3
"""Of a masked sum: of a sum of two, each of the two can take its own away and has the other's."""


@dataclass
class PrivacySettings:
    """What of the clients' data a run may give away. docs/privacy.md says what each protects, and what none does."""

    name: str = "none"  # none | client_dp: all data of a client | record_dp: one training window (DP-SGD)
    epsilon: float | None = (
        8.0  # of the whole run, retries and resumes included; null: no bound, noise_multiplier counts
    )
    delta: float = 1e-5
    noise_multiplier: float | None = None  # standard deviation over clip; null: the least that keeps epsilon
    clip: float = 1.0  # largest L2 norm: of a client's update (client_dp), of one window's gradient (record_dp)
    noise: str = "local"  # client_dp. local: each message is private by itself | sum: only the sum of a round's is
    releases: int | None = None  # how often one client may answer; null: as often as the rounds ask it
    secret_sampling: bool = False  # sum: who takes part is drawn secretly and told to nobody, and counted as such
    accountant: str = "pld"  # pld | rdp
    noise_seed: int | None = None  # for experiments alone: noise that can be repeated protects nothing
    secure_aggregation: bool = False  # the server sees the sum of a round's codes, and no client's own
    threshold: float = 0.5  # secure aggregation: more than this share of a round's clients must stay to its end
    levels: int = 3  # secure aggregation: values that a client's coefficient may have, odd

    @property
    def is_private(self) -> bool:
        """Whether noise is added."""
        return self.name != "none"

    @property
    def protects(self) -> bool:
        """Whether anything of the clients' is kept from the server or from others."""
        return self.is_private or self.secure_aggregation

    @property
    def is_discrete(self) -> bool:
        """Whether the noise is added to integers, in a masked sum."""
        return self.noise == "sum" and self.secure_aggregation


def check_privacy(settings: PrivacySettings) -> None:
    """Raises PrivacyError naming the first key that cannot be served."""
    _check_values(settings)
    if settings.is_private and settings.epsilon is None and settings.noise_multiplier is None:
        raise PrivacyError("privacy.epsilon=null needs privacy.noise_multiplier=NUMBER: one of them gives the noise")
    if settings.noise == "sum" and settings.name != "client_dp":
        raise PrivacyError(f"privacy.noise=sum needs privacy=client_dp, not privacy={settings.name}")
    if settings.secret_sampling and settings.secure_aggregation:
        raise PrivacyError(
            "privacy.secret_sampling=true and privacy.secure_aggregation=true do not go together: the clients of a "
            "masked sum know each other"
        )
    if settings.secret_sampling and settings.noise != "sum":
        raise PrivacyError(
            "privacy.secret_sampling=true needs privacy.noise=sum: whoever sees single messages sees who sent them"
        )


def _check_values(settings: PrivacySettings) -> None:
    for key, known in (("name", NAMES), ("noise", NOISES), ("accountant", ACCOUNTANTS)):
        if getattr(settings, key) not in known:
            raise PrivacyError(f"privacy.{key}={getattr(settings, key)!r} is none of {', '.join(known)}")
    for key in ("epsilon", "noise_multiplier", "clip"):
        value = getattr(settings, key)
        if value is not None and not value > 0:
            raise PrivacyError(f"privacy.{key}={value} must be greater than 0")
    for key in ("delta", "threshold"):
        if not 0 < getattr(settings, key) < 1:
            raise PrivacyError(f"privacy.{key}={getattr(settings, key)} must lie between 0 and 1")
    if settings.releases is not None and settings.releases < 1:
        raise PrivacyError(f"privacy.releases={settings.releases} must be at least 1, or null")
    if not (3 <= settings.levels <= MAX_LEVELS and settings.levels % 2):
        raise PrivacyError(f"privacy.levels={settings.levels} must be odd, from 3 to {MAX_LEVELS}")
