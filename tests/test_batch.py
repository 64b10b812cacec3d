"""Packs on their way to the device: made ahead, in order, and copied without a wait."""

import threading
from dataclasses import fields, is_dataclass
from unittest import mock

import torch
from conftest import random_pairs
from torch import Tensor

from conj.data.packs import plan_packs
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.train import batch as batch_module
from conj.train.batch import batches_ahead, collate, to_device

CPU = torch.device("cpu")


def packs_of(model) -> tuple:
    pairs = tokenize_pairs(random_pairs(12), JudgeTokenizer.load(model), 600)
    return pairs, plan_packs(pairs, range(len(pairs)), max_tokens=900, share="prompt")


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list):
        return [t for v in value for t in tensors_of(v)]
    return [t for f in fields(value) for t in tensors_of(getattr(value, f.name))] if is_dataclass(value) else []


def test_batches_come_in_order_and_with_their_reference(tied_model):
    pairs, packs = packs_of(tied_model)
    reference = torch.randn(len(pairs), 2)
    batches = list(batches_ahead(pairs, [*packs, None], CPU, reference))
    assert len(packs) > 3 and len(batches) == len(packs) + 1
    for batch, pack in zip(batches, [*packs, None]):
        assert torch.equal(batch.input_ids, collate(pairs, pack).input_ids)
        assert torch.equal(batch.reference, reference[batch.pair_numbers])
    assert list(batches_ahead(pairs, [], CPU)) == []


def test_the_next_pack_is_made_while_one_is_used(tied_model, monkeypatch):
    """Without a call for it, by another thread; and not the one after it, or an evaluation would be held whole."""
    pairs, packs = packs_of(tied_model)
    made, threads = threading.Semaphore(0), []

    def counted(*arguments):
        threads.append(threading.current_thread())
        made.release()
        return collate(*arguments)

    monkeypatch.setattr(batch_module, "collate", counted)
    batches = batches_ahead(pairs, packs, CPU)
    next(batches)
    assert made.acquire(timeout=30) and made.acquire(timeout=30)
    assert not made.acquire(timeout=0.2) and threading.main_thread() not in threads
    batches.close()


def test_every_tensor_of_a_batch_goes_to_a_gpu_from_pinned_memory(tied_model):
    """A copy from other memory waits for all work that the device still has to do."""
    pairs, packs = packs_of(tied_model)
    batch = collate(pairs, packs[0], torch.zeros(len(pairs), 2))
    pinned, copied = [], []
    with (
        mock.patch.object(Tensor, "pin_memory", lambda self: pinned.append(self) or self),
        mock.patch.object(Tensor, "to", lambda self, device, **options: copied.append((device, options)) or self),
    ):
        to_device(batch, torch.device("cuda", 3))
    assert len(pinned) == len(tensors_of(batch)) >= 6
    assert copied == [(torch.device("cuda", 3), {"non_blocking": True})] * len(pinned)
