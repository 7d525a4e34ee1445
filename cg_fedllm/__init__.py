"""CG-FedLLM as it is installed: one package, which holds the folders of the repository under their own names.

They import each other as ``client``, ``server`` and so on, as in the repository and in the app that Flower sends to
nodes. ``cg-fedllm`` puts this package's folder in front of the path, in its own processes alone: nothing of it lies at
the root of site-packages, where such names would be others' as well.
"""
