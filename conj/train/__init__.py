"""Stages 5 and 6 on any number of ranks: the reference logprobs, and DPO."""
