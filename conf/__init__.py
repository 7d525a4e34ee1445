"""The settings of all programs: YAML groups for Hydra, and their schema."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
"""Where the project's folders lie side by side, with the model and the codec that ship with it: a checkout, or the
package that a wheel installs."""
