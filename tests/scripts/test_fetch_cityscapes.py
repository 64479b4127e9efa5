"""fetch cityscapes through cityscapesscripts' downloader: its interface is replaced, no account and no network."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from scripts import prepare_data
from scripts.prepare.fetching import CITYSCAPES, FetchError, fetch_cityscapes, find_cityscapes_downloader


@pytest.fixture
def downloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module with the functions of cityscapesscripts 2.2, which writes archives with the real layout."""
    calls = SimpleNamespace(packages=[], fail=False, account=tmp_path / "account")

    def download_packages(*, session: str, package_names: list, destination_path: str, resume: bool) -> None:
        assert session == "session" and resume
        if calls.fail:
            raise Exception("Bad credentials.")
        for name in package_names:
            calls.packages.append(name)
            folder = name.partition("_")[0]
            with zipfile.ZipFile(Path(destination_path) / name, "w") as archive:
                archive.writestr(f"{folder}/train/aachen/aachen_000000.png", b"x")
                archive.writestr("README", b"in both archives")

    modules = {
        "cityscapesscripts": ModuleType("cityscapesscripts"),
        "cityscapesscripts.download": ModuleType("cityscapesscripts.download"),
        "cityscapesscripts.download.downloader": SimpleNamespace(
            login=lambda: "session", download_packages=download_packages
        ),
        "appdirs": SimpleNamespace(user_data_dir=lambda name, author: str(calls.account)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def store_account(downloader: SimpleNamespace) -> None:
    downloader.account.mkdir()
    (downloader.account / "credentials.json").write_text("{}")


def run(root: Path) -> int:
    return prepare_data.main(["fetch", "cityscapes", "--root", str(root)])


def test_both_archives_are_unpacked(downloader: SimpleNamespace, tmp_path: Path) -> None:
    store_account(downloader)
    root = tmp_path / "data"
    assert run(root) == 0
    assert sorted(downloader.packages) == sorted(CITYSCAPES.values())
    assert sorted(p.name for p in root.iterdir()) == ["gtFine", "leftImg8bit"]
    assert (root / "gtFine/train/aachen/aachen_000000.png").is_file()
    assert run(root) == 0 and len(downloader.packages) == 2  # there already


def test_without_an_account_the_steps_are_printed(
    downloader: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path / "data") == 0
    assert "csDownload" in capsys.readouterr().out and not downloader.packages


def test_a_failure_is_named(downloader: SimpleNamespace, tmp_path: Path) -> None:
    store_account(downloader)
    downloader.fail = True
    with pytest.raises(FetchError, match="Bad credentials"):
        fetch_cityscapes(find_cityscapes_downloader(), tmp_path / "data")
