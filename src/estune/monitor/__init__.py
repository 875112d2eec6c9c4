"""What a user sees of a run: metrics, trackers, terminal panel, HTML page."""
