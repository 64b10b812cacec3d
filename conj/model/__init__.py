"""Qwen2 by hand: its layers, kernels and weights; nothing of training."""
