"""Folders of saved probabilities for the code that fits, measures and reports networks.

A case takes the place of an image, and what is stored takes the place of a network's logits. A case is read when it
is needed, and is then in memory as a whole.

Shapes: C channels, *S spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from configs.errors import UserError
from configs.fitting import Fitter
from rankseg.calibration import Calibration, fit_calibration, fit_temperature
from scripts import report
from scripts.analysis.confidence import assess, known_pairs
from scripts.analysis.measure import measure
from scripts.decoding.cases import FromStored, Reading, load_case, named
from scripts.decoding.rules import Output, check_labels, mask_labels
from trainers.distributed import World
from trainers.evaluator import Scoring
from trainers.fitted import held_out_fit
from trainers.metrics import Truth, encode
from trainers.results import fingerprint
from trainers.selective import MaskRecord, record_masks


class Folder:
    """Cases as a split: iterate over batches of one case, as stored.

    Without ``labels``, all pixels have label 0. ``scored`` are the labels that means run over, None for all.

    Attributes:
        failed: case name -> what is wrong with it; such a case is left out.
    """

    def __init__(
        self,
        cases: dict[str, Path],
        labels: dict[str, Path] | None,
        valid: dict[str, Path] | None,
        reading: Reading,
        output: Output,
        scored: Sequence[int] | None,
    ) -> None:
        self.scored = scored
        self.cases, self.labels, self.valid = cases, labels, valid
        self.reading, self.output = replace(reading, as_stored=True), output
        self.failed: dict[str, str] = {}
        self.num_images = len(cases)
        self._channels: int | None = None

    def __len__(self) -> int:
        return len(self.cases) - len(self.failed)

    @property
    def channels(self) -> int:
        """The number of channels of the first case that can be read."""
        if self._channels is None and next(iter(self), None) is None:
            raise UserError("\n".join(["no case can be read:", *self.failed.values()]))
        assert self._channels is not None
        return self._channels

    @property
    def first(self) -> int:
        """The label of the first channel."""
        return self.output.first(self.channels)

    def fingerprint(self) -> str:
        """Return a hash of path, size and time of change of all files that are read."""
        return fingerprint({name: self.sources(name) for name in self.cases if name not in self.failed})

    def checksum(self) -> str:
        """Return `fingerprint`: volumes are too large to read their contents for this."""
        return self.fingerprint()

    def sources(self, name: str) -> list[list[Any]]:
        """Return path, size and time of change of the files that a case is made of."""
        groups = (self.cases, self.labels or {}, self.valid or {})
        paths = [group[name] for group in groups if name in group]
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]

    def __iter__(self) -> Iterator[SimpleNamespace]:
        for index, name in enumerate(self.cases):
            try:
                values, targets = self._load(name)
            except UserError as error:
                self.failed[name] = str(error)
                continue
            yield SimpleNamespace(images=values[None], targets=targets[None], names=[name], indices=[index])

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        path = self.cases[name]
        for kind, group in (("label", self.labels), ("field of view", self.valid)):
            if group is not None and name not in group:
                raise UserError(f"{path}: no {kind} of this name. Fix: add it, or move the case away.")
        label = self.labels[name] if self.labels else None
        case = load_case(path, label, self.valid[name] if self.valid else None, self.reading)
        channels = len(case.probs)
        self._channels = self._channels or channels
        if channels != self._channels:
            raise UserError(f"{path}: {channels} channels, the first case has {self._channels}. Fix: move it away.")
        if case.labels is None:
            return case.probs, torch.zeros((), dtype=torch.int64).expand(case.probs.shape[1:])
        void = self.output.void
        labels = mask_labels(case.labels, case.valid, void)
        with named(label or path):
            check_labels(labels, channels + self.output.first(channels), void)
        return case.probs, torch.from_numpy(labels.astype("int64"))

    def logits(self) -> Iterator[SimpleNamespace]:
        """Iterate over batches of logits."""
        for batch in self:
            with named(self.cases[batch.names[0]]):
                batch.images = self.reading.values.logits(batch.images)
            yield batch

    def binary(self, channels: Sequence[int]) -> Iterator[SimpleNamespace]:
        """Iterate over channels as problems of two classes: batches of logits (0, z) and of labels 0 and 1."""
        for batch in self.logits():
            for c in channels:
                z = batch.images[:, c : c + 1]
                void = batch.targets == self.output.void
                yield SimpleNamespace(
                    images=torch.cat([torch.zeros_like(z), z], 1),
                    targets=(batch.targets == c + 1).long().masked_fill(void, self.output.void),
                    names=batch.names,
                    indices=[batch.indices[0] * len(channels) + c],
                )

    @property
    def info(self) -> SimpleNamespace:
        """The scored channels."""
        return SimpleNamespace(scored=self.scoring().scored)

    def scoring(self) -> Scoring:
        """Return the conventions, whose classes are the channels."""
        first, channels = self.first, self.channels
        scored = tuple(c - first for c in self.scored or range(first, channels + first))
        if not set(scored) <= set(range(channels)):
            raise UserError(f"--scored {self.scored} is invalid: labels are {first} to {channels - 1 + first}.")
        return (_ForegroundScoring if first else Scoring)(channels, scored, self.output.void)


class Stored(nn.Module):
    """A network whose images are its logits."""

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=images)


class _ForegroundScoring(Scoring):
    """Channel c is label c + 1. Label 0, the background, has no channel."""

    def encode(self, targets: Tensor) -> Truth:
        truth = encode(targets, self.num_classes + 1, self.ignore_index, self.void)
        return Truth(truth.onehot[:, 1:], truth.valid, truth.actual[:, 1:], truth.pixels)


class FolderFitter(Fitter):
    """Fit rules and calibrations on a folder of labelled cases; the values are stored in OUT/decode.fitted.json.

    Args:
        out: OUT.
        fit: the labelled cases to fit on; None if there are none.
        values: how stored values become probabilities, before a calibration.
        options: of the command line, that the values depend on.
        cfg: see `configuration`.
        device: where rules are computed.
    """

    def __init__(
        self, out: Path, fit: Folder | None, values: FromStored, options: dict[str, Any], cfg: Any, device: torch.device
    ) -> None:
        self.fit, self.values, self.options, self.out = fit, values, options, out
        super().__init__(cfg, Stored(), out / "decode", World(0, 1, device))

    def variant(self, **changes: Any) -> FolderFitter:
        """Return the fitter of another configuration."""
        cfg = OmegaConf.merge(self.cfg, changes)
        return FolderFitter(self.out, self.fit, self.values, self.options, cfg, self.world.device)

    def settings(self, kind: str | None = None) -> dict[str, Any]:
        return {**super().settings(kind), **self.options}

    def to_probs(self, kind: str | None = None) -> FromStored:  # type: ignore[override]
        return replace(self.values, calibration=self.calibration(kind or self.kind))

    def _fit_calibration(self, kind: str) -> dict[str, Any]:
        data = self._val(f"--calibrate {kind}")

        def fit(batches: Iterator[SimpleNamespace], link: str) -> Any:
            method = fit_temperature if kind == "temperature" else fit_calibration
            void = self.cfg.dataset.ignore_index
            return held_out_fit(method, self.network, batches, link, self.world, ignore_index=void)

        if not data.first:
            found = fit(data.logits(), self.values.link_of(data.channels))
        elif kind == "temperature":  # without a channel for the background, each is a binary problem of its own
            found = fit(data.binary(range(data.channels)), "softmax")
        else:
            single = [fit(data.binary([c]), "softmax") for c in range(data.channels)]
            temperature = torch.stack([one.temperature[1] for one in single])
            found = Calibration(temperature, torch.stack([one.bias[1] - one.bias[0] for one in single]))
        return found._asdict() if isinstance(found, Calibration) else {"temperature": found}

    def _val(self, need: str) -> Any:
        if self.fit is None:
            raise UserError(f"{need} is fitted on labelled cases. Fix: pass --fit PROBS LABELS.")
        return self.fit

    def _loader(self, data: Any) -> Any:
        return data

    def _scoring(self, data: Any) -> Scoring:
        return data.scoring()

    def _loss(self) -> Any:
        return _NoLoss(self.values.link or "softmax")


class _NoLoss:
    """In place of a loss, which saved probabilities do not have."""

    def __init__(self, link: str) -> None:
        self.link = link

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(torch.nan)


def configuration(probs: Path, fit: Path | None, void: int, calibrate: str, temperature: float) -> DictConfig:
    """Return what `configs.fitting` reads of the configuration of an experiment."""
    return OmegaConf.create(
        {
            "dataset": {
                "name": probs.name,
                "resize": None,
                "ignore_index": void,
                "splits": {"val": None if fit is None else str(fit), "test": str(probs)},
            },
            "protocol": {"name": "corrected", "rules": {}},
            "trainer": {"precision": "fp32"},
            "predictor": {"name": None},
            "split": "test",
            "calibrate": calibrate,
            "temperature": temperature,
            "correct_focal": False,
            "gate": 0.5,
        }
    )


def write_report(
    out: Path,
    title: str,
    scored: Folder,
    fitter: FolderFitter,
    rules: Sequence[str],
    classes: Sequence[str],
    facts: dict[str, Any],
) -> Path:
    """Write the report of labelled cases, with the measurements and the page of networks; return its path."""
    names = list(dict.fromkeys((*report.RULES, *rules)))
    kinds: dict[str, dict[str, Any]] = {"raw": {"calibrate": "none"}}
    if fitter.fit is not None:
        kinds["calibrated"] = {"calibrate": "temperature", "temperature": 1}
    if fitter.kind == "class":
        kinds["calibrated per class"] = {}
    compared, temperature = {}, math.nan
    for kind, changes in kinds.items():
        one = fitter.variant(**changes)
        compared[kind] = one.to_probs(), one.rules(names, scored)[0]  # type: ignore[arg-type]
        if kind == "calibrated":
            temperature = float(one.calibration("temperature"))  # type: ignore[arg-type]
        one.save()
    to_probs, raw = compared["raw"]

    def record(cases: Folder, progress: str) -> MaskRecord:
        return record_masks(
            fitter.network, cases, raw["rankdice"], to_probs, cases.scoring(), fitter.world, progress=progress
        )

    findings = measure(fitter.network, scored, compared, scored.scoring(), fitter.world, temperature)  # type: ignore[arg-type]
    known = None if fitter.fit is None else known_pairs(record(fitter.fit, "cases of --fit"))
    confidence = assess(record(scored, "confidence"), known)
    lead = [
        f"{len(findings.names)} cases. All rules see the same probabilities: T selects pixels with at least 0.5, "
        "max the most likely class, rankdice the mask with the largest expected Dice. Masks may overlap."
    ]
    more = {"provenance": facts}
    return report.write(out / "report", title, lead, findings, confidence, classes, names, more, {})
