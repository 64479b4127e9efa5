"""Write split files. A hash of an image's name decides its split.

The same names give the same split on every machine and in every version of Python.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from configs.errors import UserError
from configs.files import write_text
from datasets.decode import read_split

PUBLISHED = Path(__file__).resolve().parents[2] / "datasets" / "splits"


def make_split(
    stems: Sequence[str], shares: Mapping[str, float], seed: int = 0, group: str | None = None
) -> dict[str, list[str]]:
    """Return the names of each split, sorted.

    Args:
        stems: the names of all images.
        shares: split -> share of the images to hold out; the rest is "train".
        seed: another number gives another split.
        group: a regular expression; images for which it finds the same text (its first group, if it has one)
            stay together, such as the frames of a video or the images of a patient.
    """
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"shares {given} are invalid: expected each between 0 and 1, and a sum less than 1")
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        groups[_group(stem, group)].append(stem)
    ranked = sorted(groups, key=lambda key: hashlib.sha256(os.fsencode(f"{seed}/{key}")).hexdigest())
    if len(ranked) <= len(shares):
        raise UserError(f"{len(ranked)} images or groups cannot fill {len(shares) + 1} splits. Fix: add images")
    result: dict[str, list[str]] = {}
    for position, (name, share) in enumerate(shares.items()):
        wanted, chosen = max(1, round(share * len(stems))), list[str]()
        to_keep = len(shares) - position  # groups that the following splits need
        while len(chosen) < wanted and len(ranked) > to_keep:
            chosen += groups[ranked.pop(0)]
        result[name] = sorted(chosen)
    return {"train": sorted(stem for key in ranked for stem in groups[key]), **result}


def _group(stem: str, pattern: str | None) -> str:
    if pattern is None:
        return stem
    try:
        match = re.search(pattern, stem)
    except re.error as error:
        raise UserError(f"--group {pattern!r} is not a regular expression: {error}") from None
    found = match and (match[1] if match.re.groups else match[0])
    if found is None:
        raise UserError(f"--group {pattern!r} finds nothing in {stem!r}. Fix: change the expression, or the name")
    return found


def write_split(root: Path, split: Mapping[str, Iterable[str]], force: bool = False) -> list[Path]:
    """Write ``<name>.txt``, one name per line, for each split; return the paths."""
    split = {name: list(stems) for name, stems in split.items()}
    paths = {root / f"{name}.txt": "".join(f"{stem}\n" for stem in stems) for name, stems in split.items()}
    for stem in (stem for stems in split.values() for stem in stems):
        if stem.splitlines() != [stem] or stem != stem.strip():
            raise UserError(
                f"{root}/images: the name {stem!r} cannot be a line of a file. Fix: rename it, and its mask"
            )
    changed = [p for p, text in paths.items() if p.exists() and p.read_text(encoding="utf-8", errors="replace") != text]
    if changed and not force:
        names = ", ".join(path.name for path in changed)
        raise UserError(
            f"{root} has other split files ({names}), and a new split makes old scores incomparable. Fix: --force"
        )
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)


def published_split(name: str) -> dict[str, list[str]]:
    """Return a split that other people use, from ``datasets/splits``."""
    return {path.stem: read_split(path) for path in sorted((PUBLISHED / name).glob("*.txt"))}
