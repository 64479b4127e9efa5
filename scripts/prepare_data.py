"""Prepare data for training: list, fetch, check, split and measure data sets.

    python scripts/prepare_data.py list                                  the data sets, their terms and sizes
    python scripts/prepare_data.py fetch kvasir_seg                      download, verify, unpack
    python scripts/prepare_data.py check kvasir_seg                      every fault, with its path
    python scripts/prepare_data.py check folder --root mine --json       the same for a program
    python scripts/prepare_data.py split mine --val 0.15 --test 0.15     reproducible split files
    python scripts/prepare_data.py stats folder --root mine              mean, std and class frequencies

Results go to stdout, progress and errors to stderr.
Exit codes: 0 done without faults, 1 `check` found faults, 2 bad input, 3 a transfer or the disk failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError, one_line
from configs.files import lock_file, shell_word, write_text
from datasets import DatasetError
from datasets.decode import IMAGE_SUFFIXES, ImageFolder, common_suffix, list_images, make_split, read_split
from scripts import ROOT
from scripts.common import command_line, default_workers
from scripts.prepare.catalog import CATALOG, Entry
from scripts.prepare.fetching import download, fetch_cityscapes, find_cityscapes_downloader, unpack

FAULTY = 1  # exit code
SHOWN = 50  # faults that `check` prints without --all
PUBLISHED = ROOT / "datasets" / "splits"


class Outcome(NamedTuple):
    """The result of a command: the content for programs (``--json``), the lines for people, and the exit code."""

    content: dict[str, Any]
    lines: Sequence[str]
    code: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args(arguments)
    outcome: Outcome = args.run(args)
    lines = [json.dumps(outcome.content, indent=2)] if args.json else map(one_line, outcome.lines)
    print("\n".join(lines))
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    commands = parser.add_subparsers(required=True, metavar="list | check | fetch | split | stats")

    def command(name: str, run: Callable[[argparse.Namespace], Outcome], about: str) -> Callable[..., Any]:
        subparser = commands.add_parser(name, help=about)
        subparser.set_defaults(run=run)
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        subparser.add_argument("--quiet", action="store_true", help="no progress bars")
        return subparser.add_argument

    def add_data_options(add: Callable[..., Any], splits: str) -> None:
        add("name", choices=CATALOG, help="a name that `list` prints; `folder` is your own data")
        add("--root", type=Path, help="the data set's folder (default: as configured)")
        add("--split", action="append", default=[], help=f"may be repeated (default: {splits})")
        add("--classes", type=Path, help="folder only: another classes.yaml")
        add("--workers", type=int, default=default_workers(), help="threads (default: all cores)")

    command("list", _list, "the data sets, their terms, sizes and layouts")
    add = command("check", _check, "read every file and list every fault")
    add_data_options(add, "train, val; of kvasir_seg and folder also test, if it exists")
    add("--all", action="store_true", help=f"list every fault, not only the first {SHOWN}")
    add_data_options(command("stats", _stats, "mean, standard deviation and class frequencies"), "train")
    add = command("fetch", _fetch, "download, verify and unpack, or print how to get it")
    add("name", choices=CATALOG)
    add("--root", type=Path, help="where to put it (default: as configured, below data/)")
    add("--url", action="append", help="address of the archive, instead of the known ones; may be repeated")
    add("--checksum", help="ALGORITHM:HEX of the archive, instead of the known one")
    add("--keep", action="store_true", help="keep the archive after unpacking")
    add = command("split", _split, "write train.txt, val.txt and test.txt for a folder of images/")
    add("root", type=Path, help="the folder that has images/ and masks/")
    add("--val", type=float, default=0.12, help="share for validation (default: 0.12)")
    add("--test", type=float, default=0.0, help="share for testing (default: none)")
    add("--seed", type=int, default=0, help="another number gives another split")
    add("--group", metavar="REGEX", help="one split for images in whose names REGEX finds the same: '^patient\\d+'")
    published = sorted(path.name for path in PUBLISHED.iterdir())
    add("--published", choices=published, help="write this stored split instead of drawing one")
    add("--force", action="store_true", help="replace existing split files")
    return parser


def _list(args: argparse.Namespace) -> Outcome:
    """Describe the data sets of the catalogue."""
    content, lines = {}, list[str]()
    for name, entry in CATALOG.items():
        keys = ("about", "size", "licence", "home", "tree")
        fetchable = bool(entry.urls)
        content[name] = {key: getattr(entry, key) for key in keys} | {"root": str(entry.root), "fetch": fetchable}
        rows = {"size": entry.size, "terms": entry.licence, "from": entry.home, "looked for in": entry.root}
        if fetchable:
            rows["fetch"] = f"python scripts/prepare_data.py fetch {name}"
        lines += [name, f"  {entry.about}", *(f"  {key + ':':<15}{value}" for key, value in rows.items())]
        lines += [*entry.tree.splitlines(), ""]
    return Outcome(content, lines)


def _check(args: argparse.Namespace) -> Outcome:
    """Read every file of the splits; the exit code is 0 only without faults."""
    from scripts.prepare.checking import check  # needs torch

    root = args.root or CATALOG[args.name].root
    splits = CATALOG[args.name].splits(root, args.split, args.classes)
    report = check(args.name, root, splits, args.workers, progress=not args.quiet)
    faults = [f"{fault['split']}: {fault['message']}" for fault in report["faults"]]
    number = len(faults)
    if number > SHOWN and not args.all:
        faults[SHOWN:] = [f"... and {number - SHOWN} more (--all lists them)"]
    info = next(iter(splits.values())).info
    sizes = ", ".join(f"{split} {size}" for split, size in report["splits"].items())
    verdict = f"{number or 'no'} fault{'s' * (number > 1)}"
    lines = [*faults, *(f"note: {note}" for note in report["notes"])]
    lines.append(f"{args.name} in {root}: {sizes} images, {info.num_classes} classes, {verdict}")
    if not number and {"train", "val"} <= set(splits):
        words = [f"dataset={args.name}", f"dataset.root={root}"]
        if args.name == "folder":
            words += [f"dataset.num_classes={info.num_classes}"]
            words += [f"dataset.ignore_index={info.ignore_index}"] * (info.ignore_index != 255)
            words += [f"dataset.classes={args.classes}"] * (args.classes is not None)
        words += ["dataset.splits.test=test"] * ("test" in splits)
        lines.append(f"train on it: python train.py {' '.join(map(shell_word, words))}")
    return Outcome(report, lines, FAULTY if number else 0)


def _stats(args: argparse.Namespace) -> Outcome:
    """Measure the chosen splits, by default train."""
    from scripts.prepare.checking import count

    splits = CATALOG[args.name].splits(args.root or CATALOG[args.name].root, args.split or ["train"], args.classes)
    results = {split: count(data, args.workers, progress=not args.quiet) for split, data in splits.items()}
    lines = []
    for split, result in results.items():
        height, width = ("-".join(map(str, dict.fromkeys(result[key]))) for key in ("height", "width"))
        lines.append(f"{args.name} {split}: {result['images']} images, height {height}, width {width}")
        lines.append(f"{'class':<24}{'of the pixels':>14}{'in images':>12}")
        for row in result["classes"]:
            share = "-" if row["share"] is None else f"{row['share']:.3%}"
            lines.append(f"{row['index']:>3} {row['name']:<20}{share:>14}{row['images']:>12}")
        lines.append(f"    {'void':<20}{result['void']:>14.3%}   (of all pixels)")
        for key in ("mean", "std"):
            lines.append(f"{key}: [{', '.join(f'{value:.8f}' for value in result[key])}]")
    return Outcome(results, lines)


def _fetch(args: argparse.Namespace) -> Outcome:
    """Download a data set, or return the steps to get it by hand."""
    entry = CATALOG[args.name]
    if entry.kind == "Folder":
        raise UserError(
            "fetch folder is invalid: folder is your own data, which has no address. Fix: put images into "
            "ROOT/images and masks into ROOT/masks, then: python scripts/prepare_data.py split ROOT"
        )
    root = (args.root or entry.root).expanduser()
    downloader = find_cityscapes_downloader() if entry.name == "cityscapes" else None
    if not entry.urls and (args.url or args.checksum):
        raise UserError(f"--url and --checksum are not used for {entry.name}. Fix: leave them out")
    status, steps = "fetched", list[str]()
    if not entry.missing(root):
        status = "there already"
    elif downloader is not None:
        fetch_cityscapes(downloader, root, args.keep)
    elif entry.urls:
        status = _download(args, entry, root)
    else:
        status, steps = "by hand", [step.format(root=shell_word(str(root))) for step in entry.steps]
    content = {"name": entry.name, "root": str(root), "status": status, "steps": steps}
    if steps:
        lines = [f"{entry.name} cannot be fetched by a script ({entry.licence}):"]
        lines += [f"  {k}. {step}" for k, step in enumerate(steps, 1)]
    else:
        lines = [f"{entry.name}: {status}, in {root}"]
        lines += [f"next: python scripts/prepare_data.py check {entry.name} --root {shell_word(str(root))}"]
    return Outcome(content, lines)


def _download(args: argparse.Namespace, entry: Entry, root: Path) -> str:
    """Fetch the archive of a data set and unpack it into ``root``; return what was done."""
    print(f"{entry.about}\nterms: {entry.licence} ({entry.home})", file=sys.stderr)
    path = root.parent / Path(entry.urls[0]).name
    with lock_file(path.with_name(f".{path.name}.lock"), f"fetching {path}"):
        missing = entry.missing(root)
        if not missing:  # another process fetched it while this one waited for the lock
            return "there already"
        if there := [name for name in entry.holds if name not in missing]:  # unpacking never replaces files
            raise UserError(
                f"{root} has {', '.join(there)} but not {', '.join(missing)}. "
                f"Fix: remove {', '.join(there)}, or give another --root"
            )
        other = args.url is not None and args.checksum is not None  # another archive, whose size is not known
        size, checksum = None if other else entry.bytes, args.checksum or entry.checksum
        digest = download(args.url or entry.urls, path, size, checksum, progress=not args.quiet)
        if not checksum:
            print(
                f"no checksum of the archive is published. It has {digest}: pass this to --checksum to verify a later "
                "download",
                file=sys.stderr,
            )
        unpack(path, root, entry.inside)
        if not args.keep:
            path.unlink()
    return "fetched"


def _split(args: argparse.Namespace) -> Outcome:
    """Write split files."""
    folder, masks = args.root / "images", args.root / "masks"
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist. Fix: give the folder that has images/ and masks/; if both are in one folder, "
            "separate them: mkdir images masks; mv *_mask.* masks; mv *.jpg images"
        )
    done = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    if done:
        raise UserError(
            f"{folder} is already split by folders ({', '.join(done)}). "
            f"Fix: train without split files, or move all images into {folder} and all masks into {masks}"
        )
    found = list_images(folder, below=True)
    images = found.images
    if not images:
        kinds = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
        more = f"; it has files that are not read: {found.ignored_text}" if found.ignored else ""
        raise DatasetError(f"{folder} has no image{more}. Fix: put {kinds} files there")
    if args.published:
        split = {path.stem: read_split(path) for path in sorted((PUBLISHED / args.published).glob("*.txt"))}
        absent = sorted({name for names in split.values() for name in names} - images.keys())
        if absent:
            raise DatasetError(
                f"--published {args.published}: {len(absent)} of its images are not in {folder}, such as {absent[0]}. "
                "Fix: fetch the whole data set"
            )
    else:
        shares = {name: share for name, share in (("val", args.val), ("test", args.test)) if share}
        split = make_split(list(images), shares, args.seed, args.group)
    paths = write_split(args.root, split, args.force)
    drawn = list_images(masks, below=True) if masks.is_dir() else ImageFolder()
    suffix = common_suffix(images, drawn.images)
    bare = [str(path) for name, path in images.items() if name + suffix not in drawn.images]
    notes = [f"images without a mask: {len(bare)}, such as {bare[0]}; `check` lists them"] if bare else []
    for name, files in (("images", found), ("masks", drawn)):
        notes += [f"files in {name}/ that are not read: {files.ignored_text}"] if files.ignored else []
        notes += [f"{path.name} and {other.name} have the same name" for path, other in files.clashes[:1]]
    for note in notes:
        print(one_line(f"note: {note}"), file=sys.stderr)
    sizes = {name: len(stems) for name, stems in split.items()}
    content = {"root": str(args.root), "seed": args.seed, "splits": sizes}
    return Outcome(content, [f"{path}: {sizes[path.stem]} images" for path in paths])


def write_split(root: Path, split: Mapping[str, Iterable[str]], force: bool = False) -> list[Path]:
    """Write ``<name>.txt``, one name per line, for each split; return the paths."""
    texts: dict[Path, str] = {}
    for name, stems in split.items():
        stems = list(stems)
        for stem in stems:
            if stem.splitlines() != [stem] or stem != stem.strip():
                raise UserError(
                    f"{root}/images: the name {stem!r} cannot be a line of a file. Fix: rename it and its mask"
                )
        texts[root / f"{name}.txt"] = "".join(f"{stem}\n" for stem in stems)
    changed = [
        path.name
        for path, text in texts.items()  # only regular files are read: reading a pipe could wait for ever
        if path.exists() and not (path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text)
    ]
    if changed and not force:
        raise UserError(
            f"{root} has other split files ({', '.join(changed)}); scores of the two splits cannot be compared. "
            "Fix: pass --force to replace them"
        )
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


if __name__ == "__main__":
    run_cli(main)
