"""PASCAL VOC 2012 segmentation: 20 kinds of objects and background; 255 is void."""

from __future__ import annotations

from pathlib import Path

from .base import DatasetInfo
from .decode import read_split
from .paired import LabelTable, Pair, PairedDataset

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def voc_colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a label in VOC's palette: its bits fill R, G and B in turn, from the top bit down."""
    red, green, blue = (sum(((label >> (3 * k + c)) & 1) << (7 - k) for k in range(8)) for c in range(3))
    return red, green, blue


INFO = DatasetInfo(
    name="voc2012",
    classes=CLASSES,
    palette=tuple(voc_colour(k) for k in range(len(CLASSES))),
    scored=tuple(range(1, 21)),  # background is left out, as in the paper
    mean=(0.45734706, 0.43338275, 0.40058118),
    std=(0.23965294, 0.23532275, 0.23984980),
)


class VOC2012(PairedDataset):
    """PASCAL VOC 2012 in the official layout; `train_aug` is the split with the SBD annotations."""

    info = INFO
    table = LabelTable({index: index for index in (*range(INFO.num_classes), INFO.ignore_index)})
    help_tree = """\
  VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
  VOCdevkit/VOC2012/SegmentationClass/2007_000032.png         palette PNG, index = class, 255 = void
  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt    (trainval.txt; train_aug.txt)
  VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png      only for train_aug
  from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval_11-May-2012.tar); Flickr terms apply."""

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of the split file. If trainval.txt is missing, `trainval` is train and val together."""
        for below in ("", "VOC2012", "VOCdevkit/VOC2012"):
            if (self.root / below / "JPEGImages").is_dir():
                self.home = self.root / below
                break
        else:
            raise self.missing_error(f"{self.root} holds no JPEGImages folder")
        return [self.pair(line) for line in self.read_lines(self.split)]

    def read_lines(self, split: str) -> list[str]:
        """Return the lines of a split file; raise DatasetError that names those that exist."""
        sets = self.home / "ImageSets" / "Segmentation"
        path = sets / f"{split}.txt"
        if path.is_file():
            return read_split(path)
        if split == "trainval":
            return sorted(self.read_lines("train") + self.read_lines("val"))
        known = ", ".join(sorted(p.stem for p in sets.glob("*.txt"))) or "none"
        raise self.missing_error(f"split {split!r} has no file {path} (present: {known})")

    def pair(self, line: str) -> Pair:
        """Return the pair of a line: an id, or the paths of image and mask below VOC2012."""
        image, *mask = line.split()
        if mask:
            stem = Path(image).stem
            return Pair(stem, self.home / image.lstrip("/"), self.home / mask[0].lstrip("/"))
        folder = "SegmentationClassAug" if self.split.endswith("aug") else "SegmentationClass"
        return Pair(image, self.home / "JPEGImages" / f"{image}.jpg", self.home / folder / f"{image}.png")
