"""Any rule as a MONAI transform, array or dictionary: `pip install . monai`, in the root of the repository.

It replaces `AsDiscrete(argmax=True)` after `Activations(softmax=True)`. Images may be 2-D or 3-D. A MetaTensor keeps
its affine and its other metadata, so that `SaveImage` and `Invertd` work as before.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_dst_type, convert_to_tensor

import rankseg


class RankSeg(Transform):
    """Turn probabilities (C, *S) into masks (C, *S) or, with ``to_label``, into a label map (1, *S), float32.

    ``unassigned`` is the label of pixels without a class, as in `rankseg.label_map`.
    """

    def __init__(
        self, rule: rankseg.Predictor = rankseg.rankdice, to_label: bool = False, unassigned: str | int = 0
    ) -> None:
        self.rule, self.to_label, self.unassigned = rule, to_label, unassigned

    def __call__(self, probs: Any) -> Any:
        values = convert_to_tensor(probs, track_meta=False)[None].float()
        result = self.rule(values)
        if self.to_label:
            first = int(values.shape[1] == 1)  # one channel: 1 is the object
            result = rankseg.label_map(result, self.unassigned, values, first=first)[:, None]
        return convert_to_dst_type(result[0].float(), probs, dtype=torch.float32)[0]


class RankSegd(MapTransform):
    """Apply `RankSeg` to the given keys of a dictionary. ``options`` are those of `RankSeg`."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **options: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = RankSeg(**options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(data) | {key: self.transform(data[key]) for key in self.key_iterator(data)}


if __name__ == "__main__":
    probs = torch.rand(3, 8, 16, 16).softmax(0)
    print("labels", RankSeg(to_label=True)(probs).unique().tolist())
