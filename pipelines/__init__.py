"""Input pipelines: from one `.beton` to augmented views on the device."""
