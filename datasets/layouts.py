"""The files that each data set is expected to consist of, where they come from, and their terms."""

from __future__ import annotations

VOC2012 = """\
  VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
  VOCdevkit/VOC2012/SegmentationClass/2007_000032.png         palette PNG, index = class, 255 = void
  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt    (trainval.txt; train_aug.txt)
  VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png      only for train_aug
  from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval_11-May-2012.tar); Flickr terms apply."""

KVASIR_SEG = """\
  Kvasir-SEG/images/*.jpg, Kvasir-SEG/masks/*.jpg               as released; split 880 / 120 by name, or by
  Kvasir-SEG/{train,val,test}.txt                               one name a line, or instead of these three
  Kvasir-SEG/{images,masks}_split/{train,val}/jpg_{images,masks}/*.jpg
  from https://datasets.simula.no/kvasir-seg/ ; for research and education, citing Jha et al., MMM 2020."""

CITYSCAPES = """\
  cityscapes/leftImg8bit/{train,val}/<city>/<city>_000000_000019_leftImg8bit.png
  cityscapes/gtFine/{train,val}/<city>/<city>_000000_000019_gtFine_labelIds.png   (not labelTrainIds)
  from https://www.cityscapes-dataset.com/downloads/ (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip);
  free for research after registration."""

FOLDER = """\
  mine/images/*.jpg, mine/masks/*.png                 pairs share a name; grey masks of class indices
  mine/{train,val}.txt                                a name a line; or {images,masks}/{train,val}/
  mine/classes.yaml                                   classes: [background, lesion]"""
