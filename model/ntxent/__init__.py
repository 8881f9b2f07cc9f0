"""NT-Xent, the normalised temperature-scaled cross entropy loss."""
