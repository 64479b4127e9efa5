"""Two processes make what one makes: losses, weights, scores; and they stop together.

The network has no BatchNorm in train mode: on CPU its statistics are those of a process's own images, so that they
depend on how a batch is shared, in any framework. On GPUs SyncBatchNorm takes them over all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import TrainingError
from tests.trainers.forked import ROOT, SMALL, begin, ranks, rows, run_dir, same, start, state, train, wait_for
from tests.trainers.test_update import Net, batch
from trainers.distributed import World, gather_objects, join_world, max_over_ranks, share_buffers, unwrap, wrap
from trainers.losses import CrossEntropy
from trainers.update import Update

STEPS = 3


def join(processes: list[Any], codes: tuple[int, ...] = (0, 0)) -> None:
    for process in processes:
        process.join(120)
    assert tuple(process.exitcode for process in processes) == codes


def share(given: Any, world: World) -> Any:
    """This process's slice of a global batch of five: two images and three, of unlike numbers of labels."""
    cut = slice(0, 2) if world.rank == 0 else slice(2, 5)
    given.images, given.targets = given.images[cut], given.targets[cut]
    given.names = given.names[cut]
    return given


def steps(world: World, accumulate: int) -> dict[str, Any]:
    torch.manual_seed(1)
    net = Net(aux=True)
    model = wrap(net, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    update = Update(model, CrossEntropy(), optimizer, world, accumulate=accumulate)
    batches = [batch(seed=seed) for seed in range(STEPS)]
    losses = [update(share(given, world) if world.size > 1 else given) for given in batches]
    return {"losses": losses, "weights": {k: v.clone() for k, v in unwrap(update.model).state_dict().items()}}


def two_processes(environment: dict[str, str], folder: Path) -> None:
    """What each of two ranks does; it writes down what it saw."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        seen: dict[str, Any] = {
            "gathered": gather_objects(world.rank, world),
            "highest": max_over_ranks(world.rank, world),
        }
        seen["parts"] = {parts: steps(world, parts) for parts in (1, 2)}
        net = nn.BatchNorm2d(2)
        net.running_mean += world.rank
        share_buffers(net, world)
        seen["mean"] = net.running_mean.tolist()
        seen["dropout"] = (wrap(nn.Linear(1, 1), world), torch.rand(1).item())[1]
        given = share(batch(), world)
        if world.rank == 1:
            given.images[0] = float("nan")
        net = Net()
        before = [p.clone() for p in net.parameters()]
        update = Update(wrap(net, world), CrossEntropy(), torch.optim.SGD(net.parameters(), 0.1), world)
        try:
            update(given)
        except TrainingError as error:
            seen["refused"] = str(error)
        after = zip(before, net.parameters(), strict=True)
        seen["moved"] = world.rank == 0 and any(not torch.equal(a, b) for a, b in after)
    torch.save(seen, folder / f"rank{world.rank}.pth")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    join([start(two_processes, environment, folder) for environment in ranks(2)])
    return [torch.load(folder / f"rank{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_and_weights_are_those_of_one_process(parts: int, seen: list[dict[str, Any]]) -> None:
    alone = steps(World(0, 1, torch.device("cpu")), 1)
    for rank in (0, 1):
        found = seen[rank]["parts"][parts]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
    same(seen[0]["parts"][parts], seen[1]["parts"][parts])


def test_the_few_calls(seen: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in seen] == [[0, 1], [0, 1]]
    assert [rank["highest"] for rank in seen] == [1, 1]
    assert [rank["mean"] for rank in seen] == [[0, 0], [0, 0]]
    assert seen[0]["dropout"] != seen[1]["dropout"]


def test_all_ranks_reject_a_batch_together_and_name_all_of_it(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "loss is nan on the batch image0, image1, image2, image3, image4" in rank["refused"]
        assert not rank["moved"]


def both(name: str, arguments: tuple[str, ...], folder: Path) -> list[Any]:
    """A command in two processes, as torchrun starts it."""
    return [
        begin(name, *arguments, log=folder / f"rank{rank}.txt", environment=environment)
        for rank, environment in enumerate(ranks(2))
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by two processes, which were asked to stop, one of them only, and began again."""
    folder = tmp_path_factory.mktemp("pair")
    arguments = (*SMALL, f"save_dir={folder}")
    processes = both("train.py", arguments, folder)
    assert wait_for(lambda: (run_dir(folder) / "last.pth").exists(), processes[0])
    os.kill(processes[1].pid, signal.SIGUSR2)
    join(processes, (75, 75))
    join(both("train.py", arguments, folder))
    return folder


def test_ranks_stop_together_and_resume_and_rank_0_alone_prints(pair: Path) -> None:
    first, second = ((pair / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert "interrupted by a signal at another rank" in first and "interrupted by SIGUSR2" in second
    assert "resuming after epoch" in first and "batch 2 on 2 x cpu, BatchNorm over 1 images" in first
    assert "done. Score it" in first and "done" not in second and "val loss" not in second
    whole = pair / "whole"
    join(both("train.py", (*SMALL, f"save_dir={whole}"), whole))
    for name in ("checkpoint-epoch1.pth", "checkpoint-epoch2.pth"):
        same(state(run_dir(pair) / name), state(run_dir(whole) / name))
    assert rows(run_dir(pair)) == rows(run_dir(whole))


def test_two_processes_score_as_one_and_each_image_once(pair: Path, tmp_path: Path) -> None:
    checkpoint = run_dir(pair) / "checkpoint-epoch2.pth"
    arguments = ("-r", str(checkpoint), "-p", "all", "-p", "auto", "split=val", "gate=fit", "calibrate=temperature")
    arguments += ("--device", "cpu")
    join(both("test.py", (*arguments, "--out", str(tmp_path / "two")), tmp_path))
    fitted = checkpoint.with_name("checkpoint-epoch2.fitted.json")
    by_two = json.loads(fitted.read_text())
    fitted.unlink()
    alone = begin("test.py", *arguments, "--out", str(tmp_path / "one"), log=tmp_path / "alone.txt")
    join([alone], (0,))
    assert {entry["kind"] for entry in by_two["entries"]} >= {"temperature", "T_fit", "pooled_dice", "rankdice", "auto"}
    assert by_two == json.loads(fitted.read_text())
    for rule in ("T", "T_fit", "max", "rankdice", "pooled_dice", "auto"):
        one, two = (json.loads((tmp_path / part / f"{rule}.json").read_text()) for part in ("one", "two"))
        assert two["images"] == one["images"] == ["val_00000", "val_00001", "val_00002"]
        flat = [json.dumps(found["scores"], sort_keys=True) for found in (one, two)]
        assert numbers(flat[0]) == pytest.approx(numbers(flat[1]), abs=1e-12)
        assert (tmp_path / "one" / f"{rule}.csv").read_text() == (tmp_path / "two" / f"{rule}.csv").read_text()
    # The validation inside the training of two, too: its BatchNorm statistics are those that were saved.
    inside = [row for row in rows(run_dir(pair)) if row["kind"] == "val_max"][-1]
    outside = json.loads((tmp_path / "one" / "max.json").read_text())["scores"]
    for key in ("mean_dice", "test_loss"):  # a temperature changes neither
        assert inside[key] == pytest.approx(outside[key], abs=1e-12)


def numbers(text: str) -> list[float]:
    found: list[float] = []

    def note(value: str) -> float:
        found.append(float(value))
        return found[-1]

    json.loads(text, parse_float=note)
    return found


@pytest.mark.slow
def test_torchrun_itself_and_a_signal_to_it(tmp_path: Path) -> None:
    """torchrun hands SIGTERM on to its processes and waits for their checkpoint; the same command resumes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "train.py"), *SMALL, "epochs=8", f"save_dir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = run_dir(tmp_path)
    while process.poll() is None and not (run / "last.pth").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "the state is saved" in printed, printed
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming after epoch" in done.stdout, done.stderr
    test = [*torchrun, str(ROOT / "test.py"), "-r", str(run / "best_model.pth"), "-p", "T", "--device", "cpu"]
    done = subprocess.run(test, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (run / "results" / "T.json").exists(), done.stderr
    whole = tmp_path / "whole"
    command[-1] = f"save_dir={whole}"
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    same(state(run / "checkpoint-epoch8.pth"), state(run_dir(whole) / "checkpoint-epoch8.pth"))


def test_one_process_alone_trains_what_it_always_did(pair: Path, tmp_path: Path) -> None:
    """The order of images does not depend on the number of processes; only BatchNorm's statistics do, on CPU."""
    train(tmp_path)
    one, two = rows(run_dir(tmp_path)), rows(run_dir(pair))
    assert [(row["step"], row["kind"], row.get("lr0")) for row in one] == [
        (row["step"], row["kind"], row.get("lr0")) for row in two
    ]
