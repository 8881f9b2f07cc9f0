"""Crop and resize on the device, for images that lie there decoded."""
