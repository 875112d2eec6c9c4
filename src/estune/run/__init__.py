"""A run on disk: journal, checkpoints, records, and how a killed run is opened again."""
