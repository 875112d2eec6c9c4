"""The HTML page and the PNG curves of runs."""
