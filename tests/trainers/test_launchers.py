"""Sweeps through Hydra's launchers: every run is trained, and a pre-empted job resumes from its state."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.compose import compose as composed
from tests.trainers.forked import ROOT, SMALL, run_dir, same, state, train

CELLS = ("loss=ce,focal",)
# Ray waits 30 seconds for itself to start, which nothing changes, and a busy machine may need more; no run has started.
RAY_GAVE_UP = "The current node timed out during startup"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def sweep(save_dir: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, f"save_dir={save_dir}", *more],
        cwd=save_dir,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_launcher_whose_plugin_is_missing_says_what_to_install(tmp_path: Path) -> None:
    try:
        import hydra_plugins.hydra_ray_launcher  # noqa: F401
    except ImportError:
        printed = train(tmp_path, "launcher=ray", expect=2)
        assert "pip install hydra-ray-launcher" in printed and "Traceback" not in printed
    else:
        pytest.skip("ray's launcher is installed")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("launcher", "module"),
    [("joblib", "hydra_joblib_launcher"), ("local", "hydra_submitit_launcher"), ("ray", "hydra_ray_launcher")],
)
def test_every_run_of_a_sweep_is_trained(launcher: str, module: str, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{module}")
    for _ in range(3):
        process = sweep(tmp_path, f"launcher={launcher}", *CELLS)
        printed, _ = process.communicate(timeout=300)
        if RAY_GAVE_UP not in printed:
            break
    assert process.returncode == 0, printed
    for loss in ("ce", "focal"):
        assert (tmp_path / "synthetic" / "tiny" / loss / "seed0" / "checkpoint-epoch2.pth").exists()


@pytest.mark.slow
def test_a_pre_empted_job_is_requeued_and_resumes(tmp_path: Path) -> None:
    """submitit's signal, sent to the job itself as SLURM would; its local queue plays the cluster's."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = sweep(tmp_path, "launcher=local", "epochs=6")
    while not (run_dir(tmp_path) / "last.pth").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(job_of(tmp_path), signal.SIGUSR2)
    printed, _ = process.communicate(timeout=300)
    logs = "".join(path.read_text() for path in (tmp_path / ".submitit").rglob("*_log.*"))
    assert process.returncode == 0, printed + logs
    assert "Requeued" in logs and "resuming after epoch" in logs
    train(tmp_path / "whole", "epochs=6")
    name = "checkpoint-epoch6.pth"
    same(state(run_dir(tmp_path) / name), state(run_dir(tmp_path / "whole") / name))


def job_of(save_dir: Path) -> int:
    """The process that trains, among those of the local queue: it wrote itself into the run's lock."""
    return int((run_dir(save_dir) / ".lock").read_text().split()[0])


def test_slurm_jobs_are_requeued_before_their_time_is_up(tmp_path: Path) -> None:
    """What would be handed to sbatch."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        launcher = compose("train", ["launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher.max_num_timeout > 0 and launcher.signal_delay_s > 0
    text = _make_sbatch_string(
        "python job.py",
        folder=str(tmp_path),
        signal_delay_s=launcher.signal_delay_s,
        additional_parameters=dict(launcher.additional_parameters),
    )
    assert re.search(r"#SBATCH --signal=USR2@120", text), text
    assert "#SBATCH --requeue\n" in text and "#SBATCH --open-mode=append" in text
    assert composed("train", ["launcher=slurm"]).seed == 0
