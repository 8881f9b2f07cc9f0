"""Colour jitter, grayscale, blur, solarize, normalise."""
