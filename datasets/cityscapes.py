"""Cityscapes, fine annotations: 19 classes, selected from the 34 label ids of the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .base import DatasetError, DatasetInfo, spread
from .decode import decode_mask
from .paired import LabelTable, Pair, PairedDataset, read_valid

# (label id in the files, name, colour); the position in this list is the train id.
CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
VOID = 255
LAST_LABEL_ID = 33
LAST_TRAIN_ID = len(CLASSES) - 1

INFO = DatasetInfo(
    name="cityscapes",
    classes=tuple(name for _, name, _ in CLASSES),
    palette=tuple(colour for _, _, colour in CLASSES),
    scored=tuple(range(len(CLASSES))),
    ignore_index=VOID,
    mean=(0.28689529, 0.32513294, 0.28389176),
    std=(0.17613647, 0.18099176, 0.17772235),
)
IMAGE_END = "_leftImg8bit.png"
MASK_END = "_gtFine_labelIds.png"


class Cityscapes(PairedDataset):
    """Cityscapes as released. Every label id outside the 19 classes is void, also -1, which is stored as 255."""

    info = INFO
    table = LabelTable(
        dict.fromkeys([*range(LAST_LABEL_ID + 1), 255], VOID)
        | {label_id: train_id for train_id, (label_id, _, _) in enumerate(CLASSES)}
    )
    help_tree = """\
  cityscapes/leftImg8bit/{train,val}/<city>/<city>_000000_000019_leftImg8bit.png
  cityscapes/gtFine/{train,val}/<city>/<city>_000000_000019_gtFine_labelIds.png   (not labelTrainIds)
  from https://www.cityscapes-dataset.com/downloads/ (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip);
  free for research after registration."""

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of every city, cities and frames sorted by name."""
        images, masks = self.root / "leftImg8bit" / self.split, self.root / "gtFine" / self.split
        if not (images.is_dir() and masks.is_dir()):
            raise self.missing_error(f"split {self.split!r} has no folders {images} and {masks}")
        frames = {self.key(path, IMAGE_END): path for path in sorted(images.glob(f"*/*{IMAGE_END}"))}
        labels = {self.key(path, MASK_END): path for path in sorted(masks.glob(f"*/*{MASK_END}"))}
        pairs = self.match(frames, labels, masks)
        return [Pair(Path(key).name, image, labels.get(key, masks / f"{key}{MASK_END}")) for key, image, _ in pairs]

    @staticmethod
    def key(path: Path, end: str) -> str:
        """Return the city and the name of a frame, which its files share."""
        return f"{path.parent.name}/{path.name.removesuffix(end)}"

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8 in train ids. Reject a file that already holds train ids: most would be void."""
        train_ids = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        if not path.exists() and train_ids.exists():
            raise DatasetError(
                f"{path} is missing, only {train_ids.name} is there. Fix: fetch gtFine again for label ids"
            )
        raw = decode_mask(path)
        if VOID in raw.tobytes() and only_train_ids(raw):
            raise DatasetError(looks_like_train_ids(path))
        return self.encode(raw, path)

    def remedy(self, unknown: list[int]) -> str:
        return f"fetch gtFine again; its label ids are 0..{LAST_LABEL_ID}, and 255 for -1"

    def faults_as_a_whole(self) -> list[str]:
        """Return a fault if none of 8 masks has an id above 18: then all masks hold train ids."""
        chosen = [self.pairs[index].mask for index in spread(len(self), 8)]
        masks = list(read_valid(chosen, decode_mask))
        if masks and all(map(only_train_ids, masks)):
            return [looks_like_train_ids(chosen[0])]
        return super().faults_as_a_whole()


def only_train_ids(raw: np.ndarray) -> bool:
    """Return whether all labels are train ids or void. In label ids, every street has larger ones, such as cars."""
    return not bool(((raw > LAST_TRAIN_ID) & (raw != VOID)).any())


def looks_like_train_ids(path: Path) -> str:
    return f"{path} holds train ids (0..{LAST_TRAIN_ID}, 255) but label ids are needed. Fix: fetch gtFine again"
