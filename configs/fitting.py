"""Fit the values that the rules of a checkpoint need, store them next to it, and read them again.

Fitted on the validation split: calibrations, thresholds, gates (the expected Dice below which a ranking rule returns an
empty mask), and the choice of a rule. Fitted on the scored split, without labels: the cut-offs of the pooled rules.
Commands with labelled images fit; those without, such as ``predict_images.py``, only read.

This module decides when and with which options a value is fitted; `trainers/fitted.py` has the fits, the fitted rules
and the file. A new fitted rule needs a branch in `Fitter.rules`, `Fitter._build` and `Fitter.report`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from configs import build
from configs.errors import ConfigError, UserError, one_line
from datasets import SegmentationDataset
from rankseg import Predictor
from rankseg.calibration import Calibration, fit_calibration, fit_temperature
from rankseg.pooled import ProbabilityHistogram
from trainers.distributed import World, gather_objects
from trainers.evaluator import evaluate
from trainers.fitted import (
    FittedFile,
    RuleWithOwnProbs,
    ThresholdFit,
    ThresholdTable,
    choose,
    fit_calibration_on,
    fit_gate,
    gated_rule,
)
from trainers.forward import ToProbs, forward, measure
from trainers.losses import Focal, Link, SegmentationLoss
from trainers.metrics import Scoring, mean_over_classes
from trainers.results import EvalResult, results_folder

_CALIBRATED = "rankdice calibrated"  # a candidate of rule auto


def calibration_kind(cfg: DictConfig) -> str:
    """Return none, temperature or class; raise ConfigError if ``temperature`` contradicts ``calibrate``."""
    same = cfg.calibrate == "temperature" and cfg.temperature == "fit"
    if cfg.calibrate != "none" and cfg.temperature != 1 and not same:
        raise ConfigError(
            f"temperature={cfg.temperature} and calibrate={cfg.calibrate} both change the logits. "
            "Fix: pass one of them."
        )
    return "temperature" if cfg.temperature == "fit" else str(cfg.calibrate)


def is_calibrated(cfg: DictConfig) -> bool:
    return calibration_kind(cfg) != "none" or cfg.temperature != 1


def focal_gamma(cfg: DictConfig, loss: SegmentationLoss) -> float:
    """Return the exponent of the focal loss that ``correct_focal`` corrects, 0 without it.

    Raises ConfigError if the network was trained with another loss, whose probabilities do not have this bias.
    """
    if not cfg.correct_focal:
        return 0.0
    if not isinstance(loss, Focal):
        raise ConfigError(
            f"correct_focal=true needs a network trained with loss=focal, and this one has loss={cfg.loss.name}. "
            "Fix: remove correct_focal, or pass calibrate=temperature or calibrate=class."
        )
    return float(loss.gamma)


def folder_of_results(checkpoint: Path, cfg: DictConfig, rules: Iterable[str]) -> Path:
    """Return the folder of the results of rules under a configuration with the options of ``configs/test.yaml``."""
    below = results_folder(
        checkpoint.name,
        cfg.protocol.results,
        threshold=build.threshold(cfg),
        calibrated=is_calibrated(cfg),
        per_class=cfg.calibrate == "class",
        focal_corrected=cfg.correct_focal,
        gate=cfg.gate,
        options=build.changed_options(rules, cfg),
    )
    return checkpoint.resolve().parent / below


class Fitter:
    """The fitted values of one checkpoint and its network under one configuration.

    ``cfg`` has the options of ``configs/test.yaml``. With ``may_fit`` missing values are fitted; otherwise they must be
    in the checkpoint's `FittedFile`.
    """

    def __init__(
        self, cfg: DictConfig, network: nn.Module, checkpoint: Path, world: World, *, may_fit: bool = True
    ) -> None:
        self.cfg, self.network, self.world, self.may_fit = cfg, network, world, may_fit
        self.kind = calibration_kind(cfg)
        self.file = FittedFile(checkpoint, world, replace=may_fit)
        loss = self._loss()
        self.link = cast(Link, loss.link)
        self.focal_gamma = focal_gamma(cfg, loss)
        self.precision = str(cfg.trainer.precision)
        self._validation: SegmentationDataset | None = None

    def settings(self, kind: str | None = None) -> dict[str, Any]:
        """Return the options that the logits depend on; with a ``kind``, also those of the calibration."""
        cfg = self.cfg
        logits = {
            "dataset": cfg.dataset.name,
            "protocol": cfg.protocol.name,
            "resize": OmegaConf.to_container(cfg.dataset)["resize"],  # type: ignore[index,call-overload]
            "precision": self.precision,
        }
        if kind is None:
            return logits
        fixed = None if kind != "none" else float(cfg.temperature)
        return {**logits, "calibrate": kind, "temperature": fixed, **self.describe_focal()}

    def rule_settings(self, name: str) -> dict[str, Any]:
        """Return the options that change the masks of a rule."""
        node = build.rule_node(name, self.cfg)
        options = {key: value for key, value in node.items() if not key.startswith("_")}
        return {**self.settings(self.kind), "gate": self.cfg.gate, **options}

    def to_probs(self, kind: str | None = None) -> ToProbs:
        """Return the conversion of logits for a kind of calibration; default: that of the configuration."""
        kind = kind or self.kind
        return ToProbs(self.link, self.calibration(kind), self.focal_gamma)

    def calibration(self, kind: str) -> float | Calibration:
        """Return the temperature, which divides the logits, or a temperature and a bias for each class."""
        if kind == "none":
            return float(self.cfg.temperature)
        values = self._values(kind, self.settings(), partial(self._fit_calibration, kind), f"calibrate={kind}")
        with self._as_user_error(f"calibrate={kind}"):
            names = ("temperature",) if kind == "temperature" else ("temperature", "bias")
            parts = [torch.tensor(values[name], dtype=torch.float64) for name in names]
            shape = () if kind == "temperature" else (self._classes or len(parts[0]),)
            if not all(x.shape == shape and x.isfinite().all() for x in parts) or not (parts[0] > 0).all():
                each = "a temperature above 0" + " and a bias for each class" * (kind == "class")
                raise ValueError(f"expected {each}")
        return float(parts[0]) if kind == "temperature" else Calibration(*parts)

    @property
    def _classes(self) -> int | None:
        """The number of classes; None if it is not known, as for the cases of decode.py."""
        return self.cfg.dataset.get("num_classes")

    @contextlib.contextmanager
    def _as_user_error(self, what: str) -> Iterator[None]:
        """Convert an error in the use of stored values to a UserError, because the file may be damaged or forged."""
        try:
            yield
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{self.file.path} holds invalid values for {what} ({error}). "
                "Fix: delete it, and fit again with test.py or decode.py."
            ) from error

    def _fit_calibration(self, kind: str) -> dict[str, Any]:
        found = fit_calibration_on(
            fit_temperature if kind == "temperature" else fit_calibration,
            self.network,
            self.batches(self._val(f"calibrate={kind}")),
            self.link,
            self.world,
            ignore_index=self.cfg.dataset.ignore_index,
            precision=self.precision,
        )
        return found._asdict() if isinstance(found, Calibration) else {"temperature": found}

    def rules(
        self, names: Iterable[str], scored_data: SegmentationDataset | None = None
    ) -> tuple[dict[str, Predictor], dict[str, dict[str, Any]]]:
        """Return the rules of these names, and the fitted values of those that have any.

        ``scored_data`` is the split that the pooled rules are fitted on.
        """
        values: dict[str, dict[str, Any]] = {}
        rules: dict[str, Predictor] = {}
        for name in names:
            node, split = build.rule_node(name, self.cfg), None
            if name == "auto":
                fit = self._choose
            elif node.get("_target_") == "trainers.fitted.pooled_threshold":
                fit, split = partial(self._pool, node, scored_data), scored_data
            elif build.needs_fit(node):
                fit = partial(self._fit_threshold, bool(node.per_class))
            elif build.is_ranking(node) and self.cfg.gate == "fit":
                fit = partial(self._fit_gate, name)
            else:
                rules |= build.rules([name], self.cfg)
                continue
            values[name] = self._values(name, self.rule_settings(name), fit, f"rule {name}", split)
            with self._as_user_error(f"rule {name}"):
                rules[name] = self._build(name, values[name])
                if self._classes is not None:  # so that values which the rule cannot use raise an error here
                    rules[name](torch.full((1, self._classes, 1, 2), 0.5))
        return rules, values

    def _build(self, name: str, values: Mapping[str, Any]) -> Predictor:
        """Build a rule with its fitted values."""
        if build.is_ranking(build.rule_node(name, self.cfg)):  # gate=fit
            return partial(gated_rule, rule=build.rules([name], self.cfg)[name], least=float(values["least"]))
        if name != "auto":
            arguments = {key: values[key] for key in ("at", "gated") if key in values}
            return build.rules([name], self.cfg, {name: arguments})[name]
        chosen = values["rule"]
        if chosen == _CALIBRATED:
            return RuleWithOwnProbs(self.rules(["rankdice"])[0]["rankdice"], self.to_probs("temperature"))
        if chosen not in ("T", "max", "T_fit", "rankdice"):
            raise UserError(
                f"{self.file.path}: rule={chosen!r} is invalid: expected T, max, T_fit, rankdice or "
                f"{_CALIBRATED}. Fix: delete it, and fit again with test.py."
            )
        return self.rules([chosen])[0][chosen]

    def describe_calibration(self) -> dict[str, Any]:
        """Return the description of the calibration for a result file."""
        if self.kind == "none":
            return {"temperature": float(self.cfg.temperature)}
        found, data = self.calibration(self.kind), self._val("")
        if isinstance(found, float):
            return {"temperature": found, "temperature_fitted_on": data.fingerprint()}
        values = {name: value.tolist() for name, value in found._asdict().items()}
        return {"temperature": None, "calibration": {"kind": "class", **values, "fitted_on": self._describe(data)}}

    def describe_focal(self) -> dict[str, Any]:
        """Return the description of the correction; its exponent is left out if it is the usual one, 2."""
        other = self.cfg.correct_focal and self.focal_gamma != 2
        return {"correct_focal": self.cfg.correct_focal, **({"focal_gamma": self.focal_gamma} if other else {})}

    def report(self, values: Mapping[str, Mapping[str, Any]], scored_data: SegmentationDataset) -> list[str]:
        """Return lines to print: what was fitted, and a warning if it was fitted on the scored images."""
        lines = []
        if self.kind != "none":
            found = self.calibration(self.kind)
            text = f"{found:.3f}" if isinstance(found, float) else "per class"
            lines.append(f"calibrate={self.kind}: fitted on the validation split, temperature {text}")
        for name, one in values.items():
            if "rule" in one:
                lines.append(one_line(f"{name}: {one['rule']} ({one.get('why')})"))
            elif "least" in one:
                lines.append(f"{name}: masks with an expected Dice below {one['least']:g} are emptied")
            elif isinstance(one["at"], float):
                gated = ", classes whose largest probability is at most 0.5 are left out" * bool(one.get("gated"))
                lines.append(f"{name}: threshold {one['at']:g}{gated}")
        on_validation = self.kind != "none" or any("mean_dice" in one or "rule" in one for one in values.values())
        if on_validation and self._val("").fingerprint() == scored_data.fingerprint():
            lines.append(
                "warning: fitted on the images that are scored, so expect lower scores on new images "
                "(dataset.splits.val and the scored split are the same)"
            )
        return lines

    def warning_about(self, name: str) -> str:
        """Return why the masks of a rule may be poor, for images without labels; empty if there is no reason."""
        if is_calibrated(self.cfg) or self.cfg.correct_focal or not build.is_ranking(build.rule_node(name, self.cfg)):
            return ""
        return (
            f"rule {name} needs calibrated probabilities, and calibrate=none uses those of the network. "
            "Fix: compare with test.py calibrate=temperature, and pass the same option here if it scores higher."
        )

    def save(self) -> None:
        if self.world.is_main:
            self.file.save()

    def _values(
        self,
        entry: str,
        settings: Mapping[str, Any],
        fit: Callable[[], dict[str, Any]],
        label: str,
        scored_data: SegmentationDataset | None = None,
    ) -> dict[str, Any]:
        """Return the stored values of an entry, a calibration or a rule, or fit and store them.

        ``label`` names the entry in messages. The values are fitted on the split ``scored_data``; default: the
        validation split.
        """
        if not self.may_fit:
            values = self.file.find(entry, settings)
            if values is None:
                raise UserError(
                    f"{label} was not fitted for this checkpoint with these options. "
                    "Fix: first run test.py -r CHECKPOINT with the same rule and options."
                )
            return values
        data, split = (self._val(label), "val") if scored_data is None else (scored_data, str(self.cfg.split))
        values = self.file.find(entry, settings, self._describe(data, split))
        if values is None:
            found = fit().items()
            values = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in found}
            # The data are described again: the fit of decode.py leaves out unreadable cases.
            self.file.put(entry, settings, values, self._describe(data, split))
        return values

    def _describe(self, data: SegmentationDataset, split: str = "val") -> dict[str, Any]:
        return {
            "split": self.cfg.dataset.splits[split],
            "fingerprint": data.fingerprint(),
            "contents": data.checksum(),
            "num_images": len(data),
        }

    def _val(self, label: str) -> SegmentationDataset:
        """Return the validation split; ``label`` names what is fitted on it."""
        if self._validation is None:
            if not self.cfg.dataset.splits.get("val"):
                raise UserError(
                    f"{label} is fitted on a validation split, and dataset.splits.val is missing. "
                    "Fix: pass dataset.splits.val=NAME, or choose a rule or calibration without a fit."
                )
            self._validation = build.dataset(self.cfg, "val")
        return self._validation

    def batches(self, data: SegmentationDataset) -> Iterable[Any]:
        """Return the batches of a split."""
        return build.eval_loader(self.cfg, data, self.world)

    def scoring(self, data: SegmentationDataset) -> Scoring:
        """Return the conventions for scoring a split."""
        return build.scoring(self.cfg, data.info)

    def _loss(self) -> SegmentationLoss:
        """Return the loss, whose link turns logits into probabilities."""
        return build.loss(self.cfg)

    def _fit_threshold(self, per_class: bool) -> dict[str, Any]:
        found = self._find_threshold(per_class)
        return {"at": found.at, "gated": found.gated, "mean_dice": found.mean_dice}

    def _find_threshold(self, per_class: bool = False) -> ThresholdFit:
        data, to_probs = self._val("rule T_fit"), self.to_probs()
        scoring = self.scoring(data)

        def count(_: Any, targets: Tensor, logits: Tensor) -> ThresholdTable:
            return ThresholdTable.of_batch(to_probs(logits), scoring.encode(targets))

        options = {"precision": self.precision, "progress": "fitting the threshold"}
        table = measure(count, self.network, self.batches(data), self.world, **options)[0]
        return table.fit(scoring.scored, per_class)

    def _pool(self, node: Any, scored_data: SegmentationDataset | None) -> dict[str, Any]:
        """Return the cut-offs of a pooled rule. Labels are not used, so void pixels count too."""
        if scored_data is None:
            raise UserError(f"rule {node.name} needs a split to pool. Fix: score it with test.py.")
        histogram, to_probs, title = ProbabilityHistogram(), self.to_probs(), "fitting the pooled cut-offs"
        batches = self.batches(scored_data)
        for _, _, logits in forward(self.network, batches, self.world, precision=self.precision, progress=title):
            histogram.update(to_probs(logits).cpu())
        merged = ProbabilityHistogram()
        for share in gather_objects(histogram, self.world):
            merged.merge(share)
        if merged.count is None:
            raise UserError("images=0 in the split: no cut-off can be fitted. Fix: check split and dataset.root.")
        return {"at": merged.cutoffs(node.score, bool(node.pruning)).tolist()}

    def _evaluate(self, rules: Mapping[str, Predictor], progress: str, **options: Any) -> dict[str, EvalResult]:
        data = self._val(progress)
        return evaluate(
            self.network, self.batches(data), rules, self._loss(), self.scoring(data), self.world,
            to_probs=self.to_probs(), precision=self.precision, progress=progress, **options,
        )  # fmt: skip

    def _fit_gate(self, name: str) -> dict[str, Any]:
        result = self._evaluate(build.rules([name], self.cfg), "fitting the gate", confidences=True)[name]
        assert result.confidence is not None
        counts = result.counts
        least, mean = fit_gate(result.confidence, counts.dice(), counts.actual, result.scored)
        return {"least": least, "mean_dice": mean}

    def _choose(self) -> dict[str, Any]:
        """Choose among T, max, T_fit, rankdice and, unless the configuration calibrates, calibrated rankdice."""
        rules = self.rules(("T", "max", "rankdice"))[0]
        if self.kind == "none" and self.cfg.temperature == 1:
            rules[_CALIBRATED] = RuleWithOwnProbs(rules["rankdice"], self.to_probs("temperature"))
        results = self._evaluate(rules, "choosing a rule")
        dice = {name: mean_over_classes(r.counts.dice(), r.scored) for name, r in results.items()}
        held_out = self._find_threshold().leave_one_out
        assert held_out is not None
        found = choose({**dice, "T_fit": held_out})
        return {"rule": found.rule, "why": found.why, "differences_to_T": found.differences}
