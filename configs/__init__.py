"""Experiments: the YAML files, and the functions that build objects from them.

Only this package, ``train.py``, ``test.py`` and ``scripts/`` know Hydra and OmegaConf.
"""

import os

# torch reads this when it is imported. Idle OpenMP threads sleep, and leave the processor to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
