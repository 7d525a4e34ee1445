"""What the words of a report mean, in one place for all of them."""

from __future__ import annotations

TERMS = {
    "held-out loss": "Mean cross-entropy of tokens that nobody trained on, in nats per token; lower is better.",
    "perplexity": "exp(loss): among how many words, as it were, the model is undecided.",
    "round": "The server asks some clients, they train and answer, and it makes the next adapter of their answers.",
    "client": "One holder of data, called by its number (partition); its data does not leave it.",
    "adapter": "The LoRA weights that are trained, beside a base model that stays as it is.",
    "update": "What one client's training changed of the adapter.",
    "payload": "The bytes of one coded update, as they travel.",
    "bits per parameter": "Payload bits over adapter parameters; an uncoded adapter has 32.",
    "bytes in all": "Up, down, delivery, copies of a codec and its recording, added up. Not what gRPC itself adds.",
    "delivery": "What would bring every client from what it holds to the final adapter.",
    "catch-up": "Steps that a client had missed, as a part of the bytes down.",
    "accepted": "The reply was used for the next adapter.",
    "absent": "The client's node was not connected, or went away in the round.",
    "failed": "The client said that it could not, or nothing within federation.round_seconds (it was late).",
    "refused": "The server did not take what it sent, and says why.",
    "scaled": "An update longer than strategy.clip_norm_ratio allows is scaled down to it.",
    "examples": "Windows of text that a client trained on in a round: its weight in the mean, by its own word.",
    "epsilon, delta": "Of differential privacy: how much one unit of data may change what comes out.",
}
"""Word -> meaning."""
COMPARED = (
    "held-out loss", "round", "client", "payload", "bits per parameter", "bytes in all", "delivery", "catch-up",
)  # fmt: skip
"""Those that a comparison of runs uses."""
