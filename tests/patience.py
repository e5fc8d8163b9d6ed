"""How long tests wait for what will come in the end."""

from __future__ import annotations

LONGEST_S = 1200.0
"""Seconds after which a test calls a wait hung. On a loaded machine a process may take minutes to start."""
