"""Fetch Cityscapes with the downloader of the package cityscapesscripts, which knows the user's account.

Only its stored account is used: `csDownload -l` asks for it once. Nothing here reads or asks for a password.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from scripts.prepare.fetching import FetchError, unpack

PACKAGES = {"gtFine": "gtFine_trainvaltest.zip", "leftImg8bit": "leftImg8bit_trainvaltest.zip"}


def find_downloader() -> Any:
    """Return cityscapesscripts' downloader if it is installed and an account is stored, else None."""
    try:
        downloader = importlib.import_module("cityscapesscripts.download.downloader")
        folder = importlib.import_module("appdirs").user_data_dir("cityscapesscripts", "cityscapes")
    except ImportError:
        return None
    return downloader if (Path(folder) / "credentials.json").is_file() else None


def fetch(downloader: Any, root: Path, keep: bool = False) -> None:
    """Download and unpack the fine annotations and the images into a folder; a partial download is resumed.

    Raises:
        FetchError: the login or a download failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    missing = {folder: name for folder, name in PACKAGES.items() if not (root / folder).is_dir()}
    try:
        session = downloader.login()
        downloader.download_packages(
            session=session, package_names=list(missing.values()), destination_path=str(root), resume=True
        )
    except Exception as error:  # the downloader raises plain Exception for nearly everything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(
            f"cityscapesscripts cannot download {', '.join(missing.values())} ({reason}). "
            "Fix: run the same command again to resume, or csDownload -l to check the account."
        ) from error
    for folder, name in missing.items():
        unpack(root / name, root / folder, folder)
        if not keep:
            (root / name).unlink()
