"""A checkpoint from elsewhere is data: nothing in it runs, is interpolated, or is read or written on its word."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from configs import build, stored
from configs.checkpoint import load, read_state
from configs.compose import compose
from configs.errors import UserError
from configs.files import read_json, read_yaml
from datasets.decode import read_split
from datasets.folder import read_class_table
from models import CheckpointError, load_state, read_checkpoint
from models.tiny import TinyUNet
from scripts.analysis.scores import scores_from_counts
from scripts.inference.files import Review, record_settings
from trainers.checkpoint import save
from trainers.journal import read_rows

CHOICES = {
    "dataset": "folder", "model": "tiny", "loss": "focal", "optimizer": "adamw", "schedule": "poly",
    "predictor": "T", "protocol": "corrected", "trainer": "default",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed() -> dict[str, Any]:
    overrides = [f"{group}={name}" for group, name in CHOICES.items()]
    return stored.pack(compose("train", [*overrides, "run_dir=x", "batch_size=3"]), CHOICES)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split("/")
    for part in path:
        values = values[part]
    values[last] = value


ATTACK = {"_target_": "os.mkdir", "path": "owned"}
TEXT = "{_target_: os.mkdir, path: owned}"


@pytest.mark.parametrize("group", ["model", "loss", "dataset/source", "predictor", "optimizer"])
@pytest.mark.parametrize(
    "value",
    [
        ATTACK,
        [ATTACK],
        [[ATTACK]],
        {"a": [{"b": ATTACK}]},
        "${oc.env:HOME}",
        f"${{oc.create:'{TEXT}'}}",
        "\\${oc.env:HOME}",
        "$",
        ["${oc.env:HOME}"],
        float("nan"),
        2**70,
        "a\0b",
    ],
)
def test_nothing_is_built_from_a_stored_value(
    group: str, value: Any, packed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = copy.deepcopy(packed)
    put(hostile["values"], f"{group}/name" if group == "dataset/source" else f"{group}/extra", value)
    with pytest.raises(UserError):
        stored.unpack(hostile)
    assert not (tmp_path / "owned").exists()


def test_the_two_halves_of_a_reference_do_not_meet(packed: dict[str, Any], tmp_path: Path) -> None:
    """A dollar and a text that become a resolver when they are put together."""
    hostile = copy.deepcopy(packed)
    hostile["values"]["zz"] = {"a": "$", "b": f"{{oc.create:'{TEXT}'}}"}
    hostile["values"]["loss"]["ignore_index"] = "${zz.a}${zz.b}"
    with pytest.raises(UserError):
        stored.unpack(hostile)
    del hostile["values"]["zz"]
    with pytest.raises(UserError, match=r"loss\.ignore_index"):
        stored.unpack(hostile)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model._target_", "os.system"),
        ("model[_target_]", "os.system"),
        ("loss.ignore_index", 1),
        ("a.b", 1),
        (3, 1),
        (None, 1),
        ("_target_", "os.system"),
        ("_args_", [1]),
        ("x" * 100, 1),
        ("tag", "${oc.env:HOME}"),
    ],
)
def test_keys_that_are_not_ours_are_rejected(key: Any, value: Any, packed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the checkpoint's configuration holds"):
        stored.unpack({**packed, "values": {**packed["values"], key: value}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset/num_classes", "2"), ("dataset/num_classes", True), ("dataset/num_classes", 2.5),
        ("dataset/root", "//host/share"), ("dataset/root", "\\\\host\\share"), ("dataset/root", 3),
        ("dataset/splits/test", "${oc.env:HOME}"), ("dataset/splits/more", "../../etc"),
        ("dataset/name", "a</script>"), ("dataset/name", "\\input{x}"), ("suffix", "../x"),
        ("model/name", "a/b"), ("loss/gamma", "2"), ("predictor/at", [0.5]), ("seed", "1"), ("epochs", 1.5),
        ("optimizer/lr", {"a": 1}), ("dataset/crop", [1, 2, 3]), ("dataset", 3), ("model", [1]),
        ("on_error", "<b>"), ("split", "<b>"), ("trainer/precision", "x"), ("dataset/resize", "${a}"),
        ("optimizer/foo", 1), ("dataset/source/checkpoint_path", "x"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_rejected(key: str, value: Any, packed: dict[str, Any]) -> None:
    hostile = copy.deepcopy(packed)
    put(hostile["values"], key, value)
    with pytest.raises(UserError, match=key.rpartition("/")[2] if "splits" in key else key.replace("/", r"\.")):
        stored.unpack(hostile)


def test_conventions_names_and_places_come_from_here(packed: dict[str, Any]) -> None:
    """Old checkpoints hold these keys, so they are passed over, not rejected."""
    hostile = copy.deepcopy(packed)
    hostile["values"] |= {
        "protocol": {"results": "/any/dir", "rules": {"rankdice": "T"}, "void": "counted", "name": "<b>"},
        "run_dir": "/any/dir", "save_dir": "/any/dir", "device": "cuda:7", "expected": {"a": ["b"]},
    }  # fmt: skip
    hostile["values"]["model"] |= {"weights": "/etc/passwd", "_target_": "os.system"}
    hostile["values"]["predictor"] |= {"name": "rankdice", "_target_": "os.system", "at": 0.25}
    hostile["values"]["loss"]["name"] = "</script>"
    cfg, clean = stored.unpack(hostile), stored.unpack(packed)
    assert cfg.predictor.at == 0.25
    cfg.predictor.at = clean.predictor.at
    assert OmegaConf.to_container(cfg, resolve=False) == OmegaConf.to_container(clean, resolve=False)


def test_references_of_ours_stay_references(packed: dict[str, Any]) -> None:
    assert "$" not in repr(packed) and "_target_" not in repr(packed)
    cfg = stored.unpack(packed, ["dataset.root=/elsewhere", "protocol=paper"])
    assert cfg.dataset.source.root == "/elsewhere" and cfg.loss.legacy is True and cfg.batch_size == 3
    own = copy.deepcopy(packed)
    own["values"]["loss"]["legacy"] = True  # as trained with loss.legacy=true under protocol=corrected
    assert stored.unpack(own).loss.legacy is True
    bad = copy.deepcopy(packed)
    bad["values"]["dataset"]["root"] = bad["values"]["dataset"]["source"]["root"] = "/data/$x"
    assert stored.unpack(bad, ["dataset.root=/elsewhere"]).dataset.source.root == "/elsewhere"


def test_an_argument_of_the_network_that_only_a_command_line_set_is_kept() -> None:
    choices = {**CHOICES, "model": "smp_unet"}
    overrides = [f"{group}={name}" for group, name in choices.items()]
    cfg = compose("train", [*overrides, "run_dir=x", "+model.encoder_depth=3", "+model.narrow=2"])
    back = stored.unpack(stored.pack(cfg, choices))
    assert (back.model.encoder_depth, back.model.narrow) == (3, 2)
    hostile = stored.pack(cfg, choices)
    hostile["values"]["model"]["checkpoint_path"] = "x.pth"  # timm would read it
    with pytest.raises(UserError, match=r"model\.checkpoint_path"):
        stored.unpack(hostile)


def share(levels: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(levels):
        node = [node, node]
    return node


def itself() -> list[Any]:
    node: list[Any] = []
    node.append(node)
    return node


def deep(levels: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(levels):
        node = [node]
    return node


@pytest.mark.parametrize("make", [lambda: share(60), itself, lambda: deep(3000)])
def test_lists_without_end_are_rejected(make: Callable[[], Any], packed: dict[str, Any], tmp_path: Path) -> None:
    hostile = copy.deepcopy(packed)
    hostile["values"]["dataset"]["splits"] = make()
    with pytest.raises(UserError):
        stored.unpack(hostile)
    try:
        torch.save({"model": {}, "epoch": 1, "config": hostile}, tmp_path / "a.pth")
    except RecursionError:
        return  # it cannot be written by these means
    with pytest.raises(UserError):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"b{k}: &b{k} [*a, *a]\n" for k in range(9)),
        "a: &a [*a]\n",
        "[" * 5000,
        "- " * 2000 + "x",
        "a: {b: " * 500,
        "x: !!python/object/apply:os.mkdir [owned]",
        "a: " + "9" * 6000,
    ],
)
def test_yaml_is_bounded(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml"):
        stored.read_config(tmp_path / "config.yaml")
    assert not (tmp_path / "owned").exists()


BAD_JSON = [
    "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "{", '"\ud800', "NaN", '{"a": [-Infinity]}', "1e999", "9" * 6000, ""
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_is_bounded(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": stored.read_config,
    "a.json": read_json,
    "classes.yaml": lambda path: read_class_table("mine", path),
    "train.txt": read_split,
    "metrics.jsonl": read_rows,
    "predict.json": lambda path: record_settings(path.parent, {"rule": "T"}, {}, {}, force=False),
    "review.csv": lambda path: Review(path, ["a"], [0], {}),
    "T.csv": lambda path: scores_from_counts(path, {"protocol": "paper", "images": []}),
    "last.pth": read_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe_or_reads_without_end(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(300 << 20)  # sparse: it takes no room
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](path)


@pytest.fixture(scope="module")
def whole(packed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.pth"
    state = build.model(stored.unpack(packed)).state_dict()
    progress = {"epoch": 1, "step": 0, "updates": 4}
    training = {"optimizer": {}, "scaler": {}, "progress": progress, "rng": []}
    save({"format": 1, "model": state, "config": packed, "epoch": 1, "training": training}, path)
    return path


def test_a_flipped_bit_is_an_error_or_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """A bit in the padding of the archive means nothing; every other one is in a checksum's reach."""
    content, right = bytearray(whole.read_bytes()), load(whole)[0].state_dict()
    draw, rejected = random.Random(0), 0
    places = [draw.randrange(len(content) * 8) for _ in range(50)]
    places += [8 * byte + 3 for byte in (0, 30, len(content) - 22, len(content) - 1)]
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "flipped.pth").write_bytes(flipped)
        try:
            found = load(tmp_path / "flipped.pth")[0].state_dict()
        except CheckpointError:
            rejected += 1
            with pytest.raises(CheckpointError):
                read_state(tmp_path / "flipped.pth")
        else:
            assert all(torch.equal(found[key], right[key]) for key in right)
    assert rejected > 40


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float64, torch.bool])
def test_tensors_of_another_dtype_are_rejected(dtype: torch.dtype) -> None:
    network = TinyUNet(2)
    state = network.state_dict()
    key = "classifier.weight"
    with pytest.raises(CheckpointError, match=rf"{key}.*{dtype}"):
        load_state(network, state | {key: state[key].to(dtype)}, "a.pth")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_prefixes_are_removed(prefix: str) -> None:
    source, target = TinyUNet(2), TinyUNet(2)
    load_state(target, {prefix + key: tensor for key, tensor in source.state_dict().items()}, "a.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**9), torch.eye(3).to_sparse(), torch.zeros(2, 2).to_sparse_csr()]
)
def test_a_tensor_is_as_large_as_its_data(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"model": {"w": tensor}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("epoch", ["<script>", 1.5, -1, True, None, [1], 10**30, torch.tensor(1)])
def test_an_epoch_is_a_number(epoch: Any, whole: Path, tmp_path: Path) -> None:
    content = torch.load(whole, weights_only=True) | {"epoch": epoch}
    torch.save(content, tmp_path / "a.pth")
    for read in (load, read_state):
        with pytest.raises(CheckpointError):
            read(tmp_path / "a.pth")


@pytest.mark.parametrize("classes", ["ab", ["a", 1], ["a\n"], [["a"]], ["x" * 1000], {"a": 1}])
def test_classes_are_names(classes: Any, whole: Path, tmp_path: Path) -> None:
    torch.save(torch.load(whole, weights_only=True) | {"classes": classes}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="classes"):
        load(tmp_path / "a.pth")
