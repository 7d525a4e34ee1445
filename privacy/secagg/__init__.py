"""Secure aggregation: the server learns the sum of what a round's clients send, and of no client its own.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, with one round
trip more than an open round. Knows keys, bytes and integers; must not know Flower, tensors or what the integers mean.

    limits      how many clients, which thresholds, and what they are worth
    keys        a client's key pair for a run, signed by its node; what two of them share
    invitation  what the server asks of a round's clients, and the context that everything is bound to
    masks       seeds -> masks over integers
    shares      a seed in parts, of which a threshold gives it back
    messages    what travels, to the byte
    ledger      what a client remembers, so that it cannot be made to answer twice
    party       the client's side
    opening     the server's side

docs/secure-aggregation.md has the protocol, the argument and its limits.
"""

from privacy.secagg.invitation import Invitation
from privacy.secagg.keys import KeyPair, Published
from privacy.secagg.ledger import Ledger
from privacy.secagg.limits import least_stay, smallest_sum, threshold_of, threshold_warning
from privacy.secagg.messages import Answer, Contribution, Request, Traffic, traffic
from privacy.secagg.opening import LostSumError, Opening
from privacy.secagg.party import Party

__all__ = [
    "Answer",
    "Contribution",
    "Invitation",
    "KeyPair",
    "Ledger",
    "LostSumError",
    "Opening",
    "Party",
    "Published",
    "Request",
    "Traffic",
    "least_stay",
    "smallest_sum",
    "threshold_of",
    "threshold_warning",
    "traffic",
]
