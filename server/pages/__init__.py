"""The reports of finished runs: of one, and of several beside each other. Must not know how a run is made."""
