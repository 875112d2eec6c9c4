"""Monitors of a run: metrics file, trackers, terminal panel, HTML page."""
