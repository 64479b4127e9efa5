"""Segment images of any size with a trained network and any rule.

    python scripts/predict_images.py -r RUN/best_model.pth photos/ --out masks/
    python scripts/predict_images.py -r RUN/best_model.pth a.jpg b.jpg -p rankdice --overlay --out masks/
    python scripts/predict_images.py -r RUN/best_model.pth slides/ --window 512 --scales 0.75,1,1.25 --flip --out masks/

NAME.jpg becomes masks/NAME.png, a palette PNG whose indices are the classes. It has the layout of the stored pixels and
carries the EXIF orientation of the image, so that it can be used as a label again. Options add files:
    --overlay        masks/overlay/NAME.png          the mask over the image, upright
    --per-class      masks/classes/NAME/CLASS.png    the mask of each class (0 and 255); masks may overlap
    --probabilities  masks/probabilities/NAME.npy    (classes, height, width) float16, layout as stored
    --review         masks/review.csv                image, class, area, confidence, lower bound, least sure first

Overrides are those of test.py. calibrate=temperature, calibrate=class, gate=fit and the rules T_fit, pooled_dice,
pooled_iou and auto use the values that test.py fitted and stored in NAME.fitted.json. scripts/confidence.py
stores the margin of the lower bound there.

Probabilities of windows are averaged, and the rule then decides on the whole image. A rule such as rankdice may give a
pixel to several classes; the palette PNG then has the most probable of them. A pixel in no mask of a scored class is
background (the most probable class that is not scored), or void if every class is scored. Without -p RULE or
predictor=RULE the rule is rankdice if one class is scored, else rankdice_nonoverlap.

The same command resumes an interrupted one. Without --force, another checkpoint, rule, override, or option of windows,
scales or flip needs another folder, and no mask of another image and no other file is replaced. An input image is never
replaced. In folders, hidden files are skipped, and files of other formats are counted. An image that cannot be read, or
does not fit in memory, is named, and the others are segmented.
Exit codes: 0 done, 1 some images failed (each is named), 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.checkpoint import check_classes, load
from configs.cli import run_cli
from configs.compose import options
from configs.errors import TrainingError, UserError, as_training_error, one_line
from configs.files import file_sha256, shell_word
from configs.fitting import Fitter
from configs.stored import chosen_rules, reject_overrides
from datasets import DatasetError, DatasetInfo
from datasets.transforms import normalise
from scripts.common import (
    add_checkpoint_options,
    check_checkpoint_options,
    command_line,
    default_workers,
    map_in_threads,
    summary,
)
from scripts.inference import files
from scripts.inference.files import Review, dataset_info, outputs_of, record_settings, reject_collisions
from scripts.inference.windows import WHOLE, WINDOW, View, label_map, probabilities
from trainers.distributed import World, pick_device
from trainers.forward import logits_of

SOME_FAILED = 1
# Overrides of test.py without effect here -> the option for it.
UNUSED = {"num_workers": "--workers", "batch_size": "--batch", "split": "", "on_error": "", "loader_timeout": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    args = _arguments(argv)
    found, notes = files.find(args.images, args.out)
    for note in notes:
        print(one_line(f"note: {note}"), file=sys.stderr)
    reject_overrides(args.overrides, UNUSED)
    given = args.predictor or chosen_rules(args.overrides)
    network, cfg, checkpoint = load(args.resume, args.overrides, given)
    info = dataset_info(cfg, args.classes)
    check_classes(checkpoint, info.classes, args.resume)
    default = "rankdice" if len(info.scored) == 1 else "rankdice_nonoverlap"
    (rule,) = given or [default]
    fitter = Fitter(cfg, network, args.resume, World(0, 1, pick_device(args.device)), may_fit=False)
    review = _review(args, fitter, rule, info)
    segment = Segmenter(fitter, rule, info, _view(args, cfg), review)
    if warning := fitter.warning_about(rule):
        print(f"warning: {warning}", file=sys.stderr)
    outputs = {name: outputs_of(args, name, info) for name in found}
    reject_collisions(outputs, found)
    record_settings(args.out, _settings(args, rule, info), outputs, found, args.force)
    todo = [name for name in found if args.force or not all(path.exists() for path in outputs[name].values())]
    failed = 0
    pictures = map_in_threads(lambda name: _read(found[name]), todo, args.workers)
    with tqdm(total=len(todo), desc=rule, unit="image", disable=args.quiet or None) as bar:
        for name, picture in zip(todo, pictures, strict=True):
            try:
                if isinstance(picture, DatasetError):
                    raise picture
                with as_training_error(f"segmenting {found[name]}", "use a smaller --window"):
                    segment(picture, outputs[name], name)
            except (DatasetError, TrainingError) as error:  # the other images are segmented
                tqdm.write(f"error: {error}", file=sys.stderr)
                failed += 1
            del picture  # free it before the next one is read
            bar.update()
    if review:
        review.save()
    done = f"{len(todo) - failed} images segmented with {rule}"
    print(one_line(summary(args.out, done, len(found) - len(todo), failed)))
    return SOME_FAILED if failed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add = parser.add_argument
    default = "rankdice for one scored class, else rankdice_nonoverlap"
    add_checkpoint_options(parser, options("predictor"), default)
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--overlay", action="store_true", help="also write the mask over the image")
    add("--per-class", action="store_true", help="also write a mask for each class")
    add("--probabilities", action="store_true", help="also write the probabilities")
    add("--review", action="store_true", help="also write review.csv: the confidence of each mask, lowest first")
    add("--window", type=int, metavar="PIXELS",
        help=f"side of sliding windows, in pixels of the network's input (default: whole images up to "
        f"{WHOLE >> 20} Mpixel, {WINDOW} above; 0: always whole)")  # fmt: skip
    add("--overlap", type=float, default=0.25, help="share of a window that the next one repeats (default: 0.25)")
    add("--scales", default="1", help="relative sizes of the image, such as 0.75,1,1.25")
    add("--flip", action="store_true", help="average with the mirror image")
    add("--batch", type=int, default=1, help="windows per forward pass (default: 1)")
    add("--classes", type=Path, metavar="YAML", help="classes.yaml with names and colours (default: as in training)")
    add("--workers", type=int, default=default_workers(), help="threads that read images (default: all cores)")
    add("--force", action="store_true", help="replace existing masks")
    add("--quiet", action="store_true", help="no progress bar")
    add("images", nargs="+", metavar="IMAGE | FOLDER | key=value", help="images to segment; overrides as for test.py")
    args = parser.parse_intermixed_args(argv)
    is_override = [("=" in given and not Path(given).exists()) for given in args.images]
    args.overrides = [given for given, yes in zip(args.images, is_override, strict=True) if yes]
    args.images = [Path(given) for given, yes in zip(args.images, is_override, strict=True) if not yes]
    if not args.images:
        parser.error("give images or folders of images")
    check_checkpoint_options(args)
    return args


def _view(args: argparse.Namespace, cfg: DictConfig) -> View:
    """Return the windows, scales and mirror images of the options."""
    try:
        scales = tuple(float(scale) for scale in args.scales.split(","))
    except ValueError:
        raise UserError(f"--scales {args.scales} is invalid: expected numbers, such as 0.75,1,1.25") from None
    resize: Any = OmegaConf.to_container(cfg.dataset)["resize"]  # type: ignore[index,call-overload]
    if cfg.protocol.legacy_preprocessing:
        resize = cfg.dataset.eval_crop  # the paper's networks are scored on images of this shorter side
    return View(args.window, args.overlap, scales, args.flip, resize, args.batch, args.out)


def _review(args: argparse.Namespace, fitter: Fitter, rule: str, info: DatasetInfo) -> Review | None:
    """Return the review with the margins that scripts/confidence.py fitted for this rule; None without --review."""
    if not args.review:
        return None
    stored = fitter.file.find(f"margin {args.alpha:g}", fitter.rule_settings(rule))
    if stored is None:
        print(
            f"note: no margin for rule {rule} and alpha={args.alpha:g}, so review.csv has no lower bounds. "
            f"Fix: run scripts/confidence.py -r {shell_word(str(args.resume))} -p {rule} with the same options first.",
            file=sys.stderr,
        )
    margins = (stored or {}).get("classes", {})
    if not isinstance(margins, dict) or not all(type(value) in (int, float, NoneType) for value in margins.values()):
        raise UserError(f"{fitter.file.path} holds invalid margins. Fix: delete it, then run confidence.py again.")
    return Review(args.out / "review.csv", info.classes, info.scored, margins)


def _settings(args: argparse.Namespace, rule: str, info: DatasetInfo) -> dict[str, Any]:
    """Return the settings that a mask depends on, as predict.json stores them."""
    return {
        "checkpoint": file_sha256(args.resume),
        "predictor": rule,
        "classes": list(info.classes),
        **{key: getattr(args, key) for key in ("window", "overlap", "scales", "flip", "overrides")},
    }


def _read(path: Path) -> files.Picture | DatasetError:
    """Return the image, or the error of reading it: raised in a thread, it would end the reading of all images."""
    try:
        return files.read(path)
    except DatasetError as error:
        return error


class Segmenter:
    """Segment pictures with a network, a rule and a view, and write the files."""

    def __init__(self, fitter: Fitter, rule: str, info: DatasetInfo, view: View, review: Review | None) -> None:
        self.fitter, self.info, self.view, self.review = fitter, info, view, review
        self.rule = fitter.rules([rule])[0][rule]
        self.to_probs = getattr(self.rule, "to_probs", fitter.to_probs())
        self.normalise = partial(normalise, mean=info.mean, std=info.std)
        fitter.network.to(fitter.world.device).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (N, C, h, w) of normalised images (N, 3, h, w)."""
        return logits_of(self.fitter.network, pixels, None, self.fitter.world, self.fitter.precision)

    def __call__(self, picture: files.Picture, outputs: files.Outputs, name: str) -> None:
        """Segment one picture, and write its files. ``name`` is its name in review.csv."""
        pixels, orientation = picture
        device = self.fitter.world.device
        probs = probabilities(pixels, self.forward, self.to_probs, self.normalise, self.view, device)

        def save_mask(index: int, mask: Tensor) -> None:
            if index in outputs:
                files.save_mask(mask, orientation, outputs[index])
            if self.review:
                self.review.add(name, index, probs[index], mask)

        labels = label_map(probs, self.rule, self.info, save_mask)
        if "probabilities" in outputs:
            files.save_probabilities(probs, orientation, outputs["probabilities"])
        if "overlay" in outputs:
            files.save_overlay(pixels, labels, self.info, outputs["overlay"])
        # The label map is written last: its file shows that the image is done.
        files.save_labels(labels, orientation, self.info, outputs["labels"])


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = 2**31  # Pillow's limit is against hostile files; these images are the user's own
    run_cli(main)
