"""Seeds: the random numbers of a forward pass depend only on the seed, on every device."""

import pytest
import torch

from batchcls.training.seeding import derive_seed, seed_device, seeded_random

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=[gpu, needs_cuda])])
def test_dropout_depends_on_the_seed(device: str):
    dropout = torch.nn.Dropout(0.5)
    ones = torch.ones(1000, device=device)
    found = []
    for seed in (5, 6, 5):
        seed_device(device, seed)
        found.append(dropout(ones))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_seeded_random_restores_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded_random(7):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_random(7):
        assert torch.equal(torch.rand(3), first)


def test_every_part_of_a_seed_changes_it():
    seeds = {derive_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)
