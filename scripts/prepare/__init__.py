"""Parts of scripts/prepare_data.py: catalogue, download and check."""
