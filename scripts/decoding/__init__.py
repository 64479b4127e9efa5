"""Parts of scripts/decode.py."""
