"""What a run promises about its clients' data, and what it does not: as figures for a file, and in words for a card."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

from privacy.accounting import Release, epsilon_if_replaced
from privacy.budget import deviation, epsilon_of_sums, spent_epsilon
from privacy.ledger import Ledger
from privacy.settings import PrivacySettings

ALWAYS_OUTSIDE = (
    "how many clients there are, who took part when (but to whom that is kept secret), and how long each took",
    "the server's own held-out text, by which losses are measured and rehearsals are made",
    "what the base model and a trained codec artifact had learned before this run",
    "other runs on the same data: every run spends a budget of its own",
)
_UNITS = {
    "client_dp": "all data of one client",
    "record_dp": "one training window of one client (a record that is cut into several windows is several units)",
}
NEIGHBOURS = "zero-out: one unit's data are there, or nothing is in its place; how many units there are is no secret"


def guarantee(settings: PrivacySettings, ledger: Ledger | None, least_replies: int) -> dict[str, Any]:
    """Of what was released so far.

    Args:
        settings: as settled.
        ledger: what was released; None: nothing was counted, as no noise is added.
        least_replies: of which a round's sum is made.

    Returns:
        Plain values, for ``privacy.json``. ``epsilon`` is None where only the nodes can tell, and where there is none.
    """
    secure = {"secure_aggregation": settings.secure_aggregation}
    if not settings.is_private or ledger is None:
        return {"name": "none", "epsilon": None, **secure, "outside": list(_outside(settings)), "protects_from": []}
    sums = settings.noise == "sum"
    found: dict[str, Any] = {
        "name": settings.name,
        "unit": _UNITS[settings.name],
        "neighbours": NEIGHBOURS,
        "delta": settings.delta,
        "epsilon_budget": settings.epsilon,
        "clip": settings.clip,
        "noise": settings.noise,
        "noise_multiplier": settings.noise_multiplier,
        "accountant": {"name": settings.accountant, "library": f"dp-accounting {version('dp-accounting')}"},
        "releases_allowed": ledger.allowed,
        "releases_most": ledger.most,
        "rounds": len(ledger.rounds),
        **secure,
        "protects_from": list(_protects_from(settings)),
        "outside": list(_outside(settings)),
    }
    if not settings.secret_sampling:
        found["releases"] = {str(client): count for client, count in sorted(ledger.releases.items())}
    if settings.name == "record_dp":
        found["sampling"] = "windows: Poisson, at batch_size / number of windows a step, drawn by each client in secret"
        found["epsilon"] = settings.epsilon if settings.noise_multiplier is None else None
    else:
        found["sampling"] = _clients_sampling(settings)
        assert settings.noise_multiplier is not None
        found["deviation_of_a_client"] = deviation(settings, least_replies)
        sizes = [(drawn, pool) for _, drawn, pool in ledger.rounds]
        found["epsilon"] = _finite(epsilon_of_sums(settings, sizes, ledger.most) if ledger.most else 0.0)
        whole = Release(settings.noise_multiplier)
        if not sums and ledger.most:
            found["epsilon_if_replaced"] = epsilon_if_replaced(whole, ledger.most, settings.delta)
        if sums and not settings.secure_aggregation and ledger.most:
            share = Release(settings.noise_multiplier / math.sqrt(least_replies))
            found["epsilon_towards_the_server"] = _finite(spent_epsilon(settings, share, ledger.most))
    if settings.noise_seed is not None:
        found["epsilon"] = None
        found["experiment"] = (
            f"noise_seed={settings.noise_seed}: the noise can be repeated, so that NOTHING is protected"
        )
    return found


def in_words(found: dict[str, Any]) -> list[str]:
    """``guarantee`` as sentences."""
    if found["name"] == "none":
        seen = "the sum of a round's updates, and no client's own" if found["secure_aggregation"] else "every update"
        return [
            f"No differential privacy: the adapter may tell of single records that it was trained on. The server saw "
            f"{seen}.",
            f"Not protected: {'; '.join(found['outside'])}.",
        ]
    if "experiment" in found:
        return [f"An experiment: {found['experiment']}."]
    epsilon = found["epsilon"]
    spent = (
        "an epsilon that each node has computed for itself (privacy-<partition>.json in its memory)"
        if epsilon is None
        else f"epsilon = {epsilon:.4g}"
        if found["name"] == "client_dp"
        else f"epsilon <= {epsilon:.4g}"
    )
    noise = found["noise_multiplier"]
    multiplier = (
        f"{noise:.4g} times" if noise is not None else "as many times as each node's number of windows asks for"
    )
    words = [
        f"({found['unit']}): {spent} at delta = {found['delta']:g}, {found['neighbours']}.",
        f"Mechanism: L2 norm clipped to {found['clip']:g}, Gaussian noise of {multiplier} that"
        + (" in the sum of a round's updates." if found["noise"] == "sum" else ".")
        + f" Sampling: {found['sampling']}. Accountant: {found['accountant']['name']} of "
        f"{found['accountant']['library']}, over {found['releases_most']} answers of the client that gave most, "
        "lost and repeated ones counted.",
        f"Protects from: {'; '.join(found['protects_from'])}.",
        f"Not protected: {'; '.join(found['outside'])}.",
    ]
    if "epsilon_towards_the_server" in found:
        toward = found["epsilon_towards_the_server"]
        told = "no finite epsilon" if toward is None else f"epsilon = {toward:.4g}"
        words.append(f"The server itself saw single updates, towards which only {told} holds.")
    words[0] = "Differential privacy " + words[0]
    return words


def _protects_from(settings: PrivacySettings) -> tuple[str, ...]:
    everybody = "other clients", "whoever gets the adapter"
    if settings.noise == "local":
        return "the server", "whoever listens on its side", *everybody
    if settings.secure_aggregation:
        return "a server that keeps to the protocol", *everybody
    return everybody


def _outside(settings: PrivacySettings) -> tuple[str, ...]:
    named = list(ALWAYS_OUTSIDE)
    if settings.name == "record_dp":
        named.append("how many windows each client has")
    if not settings.is_private:
        named.append("training losses, which clients report")
    if settings.secure_aggregation:
        named.append("the sum itself, and what clients that work with the server can take off it")
    return tuple(named)


def _clients_sampling(settings: PrivacySettings) -> str:
    if settings.secret_sampling:
        return "clients: a fixed number a round without replacement, in secret, counted where that helps"
    return "clients: none is counted, as who takes part can be known"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
