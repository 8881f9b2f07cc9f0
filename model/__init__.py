"""Encoders, heads, losses and the methods that combine them."""
