"""Split files that never change by themselves: a place is decided by a hash of the name.

The same names give the same split on every machine, in every version of Python.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def make_split(
    stems: Sequence[str], shares: Mapping[str, float], seed: int = 0, group: str | None = None
) -> dict[str, list[str]]:
    """Return the names of each split, sorted.

    Args:
        stems: the names of all images.
        shares: split -> share of the images to hold out; what is left is "train".
        seed: another split of the same names.
        group: a regular expression; images for which it finds the same text (its first group, if it has one)
            stay together: the frames of a video, the images of a patient.

    Raises:
        ValueError: shares that leave nothing to train on, too few images, or a name without a group.
    """
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ValueError(f"shares are {given}: give each between 0 and 1, and together less than 1")
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        groups[_group(stem, group)].append(stem)
    ranked = sorted(groups, key=lambda key: hashlib.sha256(os.fsencode(f"{seed}/{key}")).hexdigest())
    if len(ranked) <= len(shares):
        raise ValueError(f"{len(ranked)} images or groups cannot fill {len(shares) + 1} splits: add images")
    result: dict[str, list[str]] = {}
    for position, (name, share) in enumerate(shares.items()):
        wanted, chosen = max(1, round(share * len(stems))), list[str]()
        to_keep = len(shares) - position  # groups that the splits after this one need
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
        raise ValueError(f"--group {pattern!r} is no regular expression: {error}") from None
    found = match and (match[1] if match.re.groups else match[0])
    if found is None:
        raise ValueError(f"--group {pattern!r} finds nothing in {stem!r}: mend the expression, or the name")
    return found


def write_split(root: Path, split: Mapping[str, Iterable[str]], force: bool = False) -> list[Path]:
    """Write ``<name>.txt``, a name a line, for each split; return the paths.

    Raises:
        ValueError: files with other content are there already and ``force`` was not given, or a name cannot be
            written as a line.
    """
    split = {name: list(stems) for name, stems in split.items()}
    paths = {root / f"{name}.txt": "".join(f"{stem}\n" for stem in stems) for name, stems in split.items()}
    unfit = [stem for stems in split.values() for stem in stems if not _fits_a_line(stem)]
    if unfit:
        raise ValueError(
            f"{root}/images: no line of a file can hold the name {unfit[0]!r}: rename it, and its mask"
        )
    changed = [
        p
        for p, text in paths.items()
        if p.exists() and p.read_text(encoding="utf-8", errors="replace") != text
    ]
    if changed and not force:
        names = ", ".join(path.name for path in changed)
        raise ValueError(
            f"{root} has other split files ({names}): a new split makes old scores incomparable; --force"
        )
    for path, text in paths.items():
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return list(paths)


def _fits_a_line(stem: str) -> bool:
    try:
        stem.encode()
    except UnicodeEncodeError:  # bytes of another encoding
        return False
    return stem.splitlines() == [stem] and stem == stem.strip()
