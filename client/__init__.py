"""The client program: local fine-tuning and encoding, on every node."""
