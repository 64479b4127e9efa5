"""What an experiment is: the YAML files, and the few functions that turn one into objects.

Only this package, ``train.py``, ``test.py`` and ``scripts/`` know Hydra and OmegaConf.
"""
