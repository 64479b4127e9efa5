"""Any rule on nnU-Net: predict with `--save_probabilities`, then decode the folder.

    nnUNetv2_predict -i imagesTs -o predictions -d 1 -c 3d_fullres --save_probabilities
    python scripts/adapters/use_nnunet.py predictions decoded --labels labelsTs -p rankdice_nonoverlap

The folder holds <case>.npz, <case>.pkl and <case>.nii.gz. `decoded/RULE/<case>.nii.gz` has the affine and the header
of nnU-Net's own segmentation. The classes of dataset.json set --names, --void and --scored (all but the first) unless
these are given. Region-based training (sigmoid regions) gives masks that overlap: pass `--write masks`, and read the
channels as the regions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.files import read_json
from scripts import decode
from scripts.common import command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Decode a folder of nnU-Net predictions; other options are those of decode.py."""
    parser = command_line(__doc__)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("out", type=Path)
    args, rest = parser.parse_known_args(argv)
    path = args.predictions / "dataset.json"
    content = read_json(path) if path.is_file() else {}
    labels = content.get("labels", {}) if isinstance(content, dict) else {}
    defaults = []
    if labels and all(isinstance(value, int) for value in labels.values()):
        names = [name for name, value in sorted(labels.items(), key=lambda item: item[1]) if name != "ignore"]
        scored = range(1, len(names))  # without the background
        defaults = ["--names", ",".join(names), "--scored", ",".join(map(str, scored))]
        if "ignore" in labels:
            defaults += ["--void", str(labels["ignore"])]
    # The last value of an option counts, so options of the command line replace these.
    return decode.main([str(args.predictions), "--out", str(args.out), *defaults, *rest])


if __name__ == "__main__":
    run_cli(main)
