"""JPEG or raw pixels to crops: one decode, any number of windows."""
