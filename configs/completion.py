"""Shell completion of train.py: what TAB asks, answered without torch, in a fraction of the time."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

# Hydra completes in zsh through bash's `complete`, which a zsh has only after these.
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
autoload -Uz bashcompinit && bashcompinit
"""


def answer() -> None:
    """Print what a shell needs, or what it may complete."""
    if "install=zsh" in sys.argv:
        print(ZSH)
    complete()


@hydra.main(config_path=str(Path(__file__).parent), config_name="train", version_base="1.3")
def complete(cfg: DictConfig) -> None:
    """Never called: Hydra answers `-sc` by itself."""
