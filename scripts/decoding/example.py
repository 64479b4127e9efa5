"""Draw volumes with known truth as NIfTI files, to try scripts/decode.py.

    python scripts/decoding/example.py volumes/ --cases 6 --size 48
    python scripts/decoding/example.py brains/ --cases 3 --template

A case has a large and a small object: ellipsoids with a wavy surface, drawn in 25 random variants. A probability in
VOLUMES/probs/CASE.nii.gz is the share of 24 variants in which the voxel is background, large object or small object.
VOLUMES/labels/CASE.nii.gz is the other variant. So the probabilities are calibrated, and neighbouring voxels depend on
each other.

--template uses a real volume: the probabilities of grey and white matter of the ICBM 152 template (197 × 233 × 189
voxels), which the package nilearn contains. The label of each voxel is drawn from them, independently of the others.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from anywhere

import numpy as np
import torch

from configs.cli import run_cli
from configs.errors import UserError, one_line
from scripts.common import command_line
from scripts.decoding.arrays import load_nifti, require

Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # probabilities (X, Y, Z, C), labels (X, Y, Z), affine
VARIANTS = 24
OBJECTS = (((0.42, 0.45, 0.5), (0.28, 0.22, 0.3)), ((0.72, 0.7, 0.45), (0.1, 0.12, 0.09)))  # centre and radii of each


def draw_variant(size: int, case: np.random.Generator, draw: np.random.Generator) -> np.ndarray:
    """Draw labels (size, size, size) uint8. ``case`` draws what the variants of a case share, ``draw`` the rest."""
    axes = np.meshgrid(*[np.linspace(0, 1, size)] * 3, indexing="ij")
    labels = np.zeros((size,) * 3, np.uint8)
    for label, (centre, radii) in enumerate(OBJECTS, 1):
        middle = np.array(centre) + case.normal(0, 0.03, 3) + draw.normal(0, 0.012, 3)
        scale = np.array(radii) * np.exp(case.normal(0, 0.1, 3) + draw.normal(0, 0.08, 3))
        coarse = torch.from_numpy(draw.normal(0, 0.12, (1, 1, 6, 6, 6)))
        wave = torch.nn.functional.interpolate(coarse, (size,) * 3, mode="trilinear")[0, 0].numpy()
        distance = sum(((a - m) / r) ** 2 for a, m, r in zip(axes, middle, scale, strict=True))
        labels[np.sqrt(distance) < 1 + wave] = label
    return labels


def draw_case(n: int, size: int) -> Case:
    """Return the shares of 24 variants as probabilities, another variant as labels, and an affine."""
    draw = np.random.default_rng([n, 1])
    labels = np.stack([draw_variant(size, np.random.default_rng([n, 0]), draw) for _ in range(VARIANTS + 1)])
    shares = np.stack([(labels[:-1] == c).mean(0, dtype=np.float32) for c in range(3)], -1)
    return shares, labels[-1], np.diag([0.8, 0.8, 2.0, 1.0])


def template_case(n: int) -> Case:
    """Return the template's probabilities of background, grey and white matter, drawn labels, and the affine."""
    found = importlib.util.find_spec("nilearn")
    folder = Path(found.submodule_search_locations[0] if found and found.submodule_search_locations else ".")
    images = []
    for name in ("gm", "wm"):
        path = folder / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise UserError(f"--template: file {path.name} of the package nilearn not found. Fix: pip install nilearn")
        images.append(load_nifti(path))
    matter = np.stack([np.asarray(image.dataobj, np.float32) / 255 for image in images], -1)
    matter /= np.maximum(matter.sum(-1, keepdims=True), 1)
    probs = np.concatenate([1 - matter.sum(-1, keepdims=True), matter], -1).clip(0, 1)
    draw = np.random.default_rng(n).random(probs.shape[:-1], np.float32)
    labels = (draw[..., None] >= probs.cumsum(-1)[..., :-1]).sum(-1, dtype=np.uint8)
    return probs, labels, images[0].affine


def main() -> None:
    """Run the command."""
    parser = command_line(__doc__)
    parser.add_argument("out", type=Path, metavar="VOLUMES", help="folder to write to")
    parser.add_argument("--cases", type=int, default=6, help="number of cases (default: 6)")
    parser.add_argument("--start", type=int, default=0, help="number of the first case; every number is another draw")
    parser.add_argument("--size", type=int, default=48, help="voxels along each axis (default: 48)")
    parser.add_argument("--template", action="store_true", help="use the ICBM 152 template instead of drawn volumes")
    args = parser.parse_args()
    if args.cases < 1 or args.size < 8:
        raise UserError(f"--cases {args.cases}, --size {args.size}: expected at least 1 case and 8 voxels.")
    nib = require("nibabel", args.out)
    for folder in ("probs", "labels"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for n in range(args.start, args.start + args.cases):
        probs, labels, affine = template_case(n) if args.template else draw_case(n, args.size)
        for folder, array in (("probs", probs), ("labels", labels)):
            nib.save(nib.Nifti1Image(array, affine), args.out / folder / f"case_{n}.nii.gz")
    print(one_line(f"{args.out}: {args.cases} cases of {'×'.join(map(str, labels.shape))} voxels"))


if __name__ == "__main__":
    run_cli(main)
