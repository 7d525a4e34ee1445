"""The settings of all programs: YAML groups for Hydra, and their schema."""
