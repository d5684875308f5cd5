"""Exported files: writing them, checking them, running them."""
