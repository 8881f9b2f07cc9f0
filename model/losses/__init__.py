"""The other losses of SimCLR's tables 2 and 4, and a loss as a module."""
