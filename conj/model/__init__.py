"""The decoder by hand: its layers, kernels and weights; nothing of training."""
