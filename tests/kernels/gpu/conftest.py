"""Triton exists for Linux only; elsewhere there is nothing here to test."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
