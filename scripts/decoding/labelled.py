"""Fit and report on folders of saved probabilities with the code for networks.

A case takes the place of an image, and what is stored takes the place of a network's logits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from configs.errors import UserError
from configs.fitting import Fitter
from rankseg.calibration import Calibration, fit_calibration, fit_temperature
from scripts.decoding.cases import Folder, FromStored
from trainers.distributed import World
from trainers.fitted import fit_calibration_on
from trainers.metrics import Scoring


class _Stored(nn.Module):
    """Network and loss of saved probabilities: the images are the logits, and the loss is NaN."""

    def __init__(self, link: str) -> None:
        super().__init__()
        self.link = link

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=images) if targets is None else torch.tensor(torch.nan)


class FolderFitter(Fitter):
    """Fit rules and calibrations on a folder of labelled cases; the values are stored in OUT/decode.fitted.json.

    Args:
        folder: the cases that are decoded.
        fit: the labelled cases to fit on; None if there are none.
        changes: entries that replace those of the configuration that the command line gives.
    """

    def __init__(self, folder: Folder, fit: Folder | None, device: torch.device, **changes: Any) -> None:
        args = folder.args
        self.args, self.fit, self.values = args, fit, folder.values
        splits = {"val": args.fit and str(args.fit[0]), "test": str(args.probs)}
        cfg = {
            "dataset": {"name": args.probs.name, "resize": None, "ignore_index": args.void, "splits": splits},
            "protocol": {"name": "corrected", "rules": {}},
            "trainer": {"precision": "fp32"},
            "predictor": {"name": None},
            "split": "test",
            "calibrate": args.calibrate,
            "temperature": args.temperature,
            "correct_focal": False,
            "gate": 0.5,
        }
        network = _Stored(args.link or "softmax")
        super().__init__(OmegaConf.create({**cfg, **changes}), network, args.out / "decode", World(0, 1, device))

    def settings(self, kind: str | None = None) -> dict[str, Any]:
        names = ("classes_axis", "key", "link", "foreground_only", "scored")
        return {**super().settings(kind), **{name: getattr(self.args, name) for name in names}}

    def to_probs(self, kind: str | None = None) -> FromStored:  # type: ignore[override]
        return replace(self.values, calibration=self.calibration(kind or self.kind))

    def _fit_calibration(self, kind: str) -> dict[str, Any]:
        data, method = self._val(f"--calibrate {kind}"), fit_temperature if kind == "temperature" else fit_calibration
        fit = partial(fit_calibration_on, method, self.network, world=self.world, ignore_index=self.args.void)
        if not data.first:
            found = fit(data.logits(), self.values.link_of(data.channels))
        elif kind == "temperature":  # the background has no channel, so each channel is a binary problem
            found = fit(data.binary(range(data.channels)), "softmax")
        else:
            single = [fit(data.binary([c]), "softmax") for c in range(data.channels)]
            temperature = torch.stack([one.temperature[1] for one in single])
            found = Calibration(temperature, torch.stack([one.bias[1] - one.bias[0] for one in single]))
        return found._asdict() if isinstance(found, Calibration) else {"temperature": found}

    def _val(self, label: str) -> Any:
        if self.fit is None:
            raise UserError(f"{label} is fitted on labelled cases. Fix: pass --fit PROBS LABELS.")
        return self.fit

    def batches(self, data: Any) -> Any:
        return data

    def scoring(self, data: Any) -> Scoring:
        return data.scoring()

    def _loss(self) -> Any:
        return self.network
