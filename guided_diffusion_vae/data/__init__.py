"""Data: simulated and measured spectrograms, as folders of images."""
