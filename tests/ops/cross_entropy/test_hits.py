"""cross_entropy_with_hits."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_problems import (
    DTYPES,
    SHAPE_IDS,
    SHAPES,
    check_hits,
    check_hits_at_the_edges,
    class_weight,
    make_case,
)

from fastcls.functional import cross_entropy, cross_entropy_with_hits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=SHAPE_IDS)
def test_hits(device, shape, dtype):
    check_hits(shape, dtype, device)


def test_hits_at_the_edges(device):
    check_hits_at_the_edges(device)


def test_hits_need_class_indices(device):
    input, target = make_case((3, 5), "prob", device=device)
    for t in (target, target.detach().requires_grad_()):
        with pytest.raises(RuntimeError, match="class indices where hits are counted"):
            cross_entropy_with_hits(input, t)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    loss, hits = cross_entropy_with_hits(input[:0], nothing)
    assert loss.isnan() and hits == 0


def test_no_gradient_of_a_weight_beside_class_indices(device):
    input, target = make_case((3, 5), "index", device=device)
    weight = class_weight(5, device=device).requires_grad_()
    for loss in (cross_entropy, cross_entropy_with_hits, F.cross_entropy):
        with pytest.raises(RuntimeError, match=r"weight.* gradient|'weight'.*requires_grad"):
            loss(input, target, weight)


@pytest.mark.parametrize("grad", [False, True])
def test_hits_compile(device, grad):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy_with_hits, fullgraph=True, backend="inductor")
    input, target = make_case((6, 5), "index", device=device)
    input.requires_grad_(grad)
    torch.testing.assert_close(compiled(input, target), cross_entropy_with_hits(input, target))
