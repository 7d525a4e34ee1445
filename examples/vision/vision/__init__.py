"""A small convolutional network on handwritten digits, all of whose weights are federated."""
