"""Autoencoders: images x to latents z and back."""
