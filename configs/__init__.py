"""What an experiment is: the YAML files, and the few functions that turn one into objects.

Only this package, ``train.py``, ``test.py`` and ``scripts/`` know Hydra and OmegaConf.
"""

import os

# torch reads it when it is imported: idle OpenMP threads sleep. Spinning ones waste a machine that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
