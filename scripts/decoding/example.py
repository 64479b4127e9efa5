"""Draw volumes with known truth, as NIfTI files: something to try scripts/decode.py on.

    python scripts/decoding/example.py volumes/ --cases 6 --size 48

A case has a large and a small object, ellipsoids with a wavy surface. VOLUMES/probs/CASE.nii.gz is the share of 24
random variants in which a voxel belongs to the background, the large and the small object; VOLUMES/labels/CASE.nii.gz
is a 25th variant. The probabilities are therefore calibrated, and neighbouring voxels depend on each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from anywhere

import numpy as np
import torch

from scripts.decoding.arrays import nibabel

VARIANTS = 24
OBJECTS = (((0.42, 0.45, 0.5), (0.28, 0.22, 0.3)), ((0.72, 0.7, 0.45), (0.1, 0.12, 0.09)))  # centres, radii


def variant(size: int, case: np.random.Generator, draw: np.random.Generator) -> np.ndarray:
    """Draw labels (size, size, size) uint8; ``case`` draws what the variants of a case share."""
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="VOLUMES")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first case: others are other volumes"
    )
    parser.add_argument("--size", type=int, default=48, help="voxels along each axis (default: 48)")
    args = parser.parse_args()
    nib = nibabel(args.out)
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    for folder in ("probs", "labels"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for n in range(args.start, args.start + args.cases):
        draw = np.random.default_rng([n, 1])
        labels = np.stack(
            [variant(args.size, np.random.default_rng([n, 0]), draw) for _ in range(VARIANTS + 1)]
        )
        shares = np.stack([(labels[:-1] == c).mean(0, dtype=np.float32) for c in range(3)], -1)
        nib.save(nib.Nifti1Image(shares, affine), args.out / "probs" / f"case_{n}.nii.gz")
        nib.save(nib.Nifti1Image(labels[-1], affine), args.out / "labels" / f"case_{n}.nii.gz")
    print(f"{args.out}: {args.cases} cases of {args.size}³ voxels")


if __name__ == "__main__":
    main()
