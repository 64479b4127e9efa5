"""Parts of scripts/prepare_data.py: catalogue, download, check and split."""
