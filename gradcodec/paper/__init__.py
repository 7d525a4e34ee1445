"""The paper's autoencoders (CG-FedLLM: Wu et al. 2024, arXiv 2405.13746), as codecs to measure against."""
