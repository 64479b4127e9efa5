"""Images of the report: input, truth, probability, and the mask of each rule."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from configs.fitting import Fitter
from rankseg import Predictor
from scripts.analysis.measure import Findings
from trainers.panels import panels, row, tiles

_WIDTH = 320  # tiles are stored at most this wide


@dataclass(frozen=True)
class Strip:
    """One image of the split: tiles as data URIs by title, and the Dice of each rule in percent."""

    name: str
    tiles: dict[str, str]
    dice: dict[str, float]


def pick(findings: Findings, number: int = 3) -> dict[str, list[int]]:
    """Choose images by their scores: largest gains and losses against T, lowest and highest Dice."""
    dice = findings.dice(findings.key("rankdice"))
    gain = dice - findings.dice(findings.key("T"))
    order = [i for i in gain.argsort(stable=True).tolist() if gain[i] == gain[i]]
    by_dice = [i for i in dice.argsort(stable=True).tolist() if dice[i] == dice[i]]
    groups = {
        "Largest gains of RankDice over T": [i for i in order[::-1][:number] if gain[i] > 0],
        "Largest losses of RankDice against T": [i for i in order[:number] if gain[i] < 0],
        "Worst images of RankDice": by_dice[:number],
        "Best images of RankDice": by_dice[::-1][:number],
    }
    return {title: picked for title, picked in groups.items() if picked}


def draw_strips(
    fitter: Fitter,
    data: Any,
    rules: Mapping[str, Predictor],
    findings: Findings,
    indices: Iterable[int],
    folder: Path,
) -> dict[int, Strip]:
    """Draw these images with the network of a fitter, and write each to ``folder`` as a PNG file."""
    positions = {name: index for index, name in enumerate(data.names)}
    picked = list(dict.fromkeys(indices))
    places = [positions[findings.names[index]] for index in picked]
    transform: Any = fitter.batches(data).transform  # type: ignore[attr-defined]
    options = fitter.link, fitter.world, places, lambda *parts: parts, fitter.precision
    seen = panels(fitter.network, data, transform, rules, *options)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for index, (name, parts) in zip(picked, seen, strict=True):
        titles = ("image", "truth", "probability", *rules)
        uris = {title: data_uri(tile) for title, tile in zip(titles, tiles(*parts).values(), strict=True)}
        dice = {rule: 100 * float(findings.dice(findings.key(rule))[index]) for rule in rules}
        drawn[index] = Strip(name, uris, dice)
        stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[:80]
        picture = row(*parts, scale=max(1, 160 // parts[0].shape[2]))
        to_pil_image(picture).save(folder / f"{len(drawn):02}-{stem}.png")
    return drawn


def data_uri(tile: Tensor) -> str:
    """Return a tile (3, H, W) uint8 as a data URI, at most as wide as it is shown."""
    picture = to_pil_image(tile)
    if picture.width > _WIDTH:
        picture = picture.resize((_WIDTH, max(1, round(picture.height * _WIDTH / picture.width))))
    small = picture.width * picture.height <= 1 << 14
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    picture.save(buffer, kind, **({"optimize": True} if small else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
