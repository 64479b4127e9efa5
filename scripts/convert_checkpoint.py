"""Convert a checkpoint released by the authors into the format of this project.

    python scripts/convert_checkpoint.py checkpoint-epoch300.pth converted.pth
    python test.py -r converted.pth -p rankdice dataset.root=/data/cityscapes

The network and what is known of its training are kept, with ``protocol=paper``; the state of the optimizer is not.
test.py also reads released files directly. A converted file is half as large and has no NumPy value, so
``torch.load(weights_only=True)`` reads it.
Exit codes: 0 done, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import stored
from configs.cli import run_cli
from configs.errors import UserError, one_line
from models import CheckpointError, read_checkpoint
from models.published import is_published, load_published
from scripts.common import command_line
from trainers.checkpoint import FORMAT, save


def convert(source: Path) -> dict[str, Any]:
    """Return a released checkpoint as the dictionary that ``trainers.checkpoint`` describes."""
    checkpoint = read_checkpoint(source)
    if checkpoint.get("format") == FORMAT and not is_published(checkpoint):
        raise CheckpointError(f"checkpoint {source} has this project's format already. Fix: pass it to test.py -r")
    network, config = load_published(checkpoint, source=f"checkpoint {source}")
    best = float(checkpoint.get("monitor_best", math.nan))
    return {
        "format": FORMAT,
        "model": network.state_dict(),
        "config": stored.pack(stored.unpack(config), config["choices"]),
        "epoch": checkpoint.get("epoch", 0),
        "score": best if math.isfinite(best) else None,
    }


def main() -> None:
    """Run the command."""
    parser = command_line(__doc__)
    parser.add_argument("source", type=Path, help="a released checkpoint")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target} exists. Fix: choose another name, or pass --force")
    payload = convert(args.source)
    save(payload, args.target)
    names = payload["config"]["choices"]
    about = f"{names['model']} on {names['dataset']} with {names['loss']}, epoch {payload['epoch']}"
    print(one_line(f"{args.target}: {about}"))


if __name__ == "__main__":
    run_cli(main)
