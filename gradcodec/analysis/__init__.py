"""What a codec does to recorded updates, beyond its fidelity: by layer, under noise and damage, and what it costs.

The analyses of the paper (CG-FedLLM: Wu et al., arXiv 2405.13746), with the controls that it lacks. Every function
gives plain rows: a dataclass of numbers and names each. ``gradcodec.training.measure`` has the fidelity itself.
"""
