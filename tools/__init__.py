"""Command-line tools around the data and the runs: `python -m tools.NAME`."""
