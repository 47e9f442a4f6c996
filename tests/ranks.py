"""What each process of the distributed test does; a module of its own, for the new processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import LeNet
from torch.nn.parallel import DistributedDataParallel

from fastcls import fuse


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, *LeNet.image, generator=g), torch.arange(8)


def gradients(rank, ranks, folder):
    """Save the gradients that rank ``rank`` ends up with on its share of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(rank)  # DistributedDataParallel spreads the weights of rank 0
    model = DistributedDataParallel(fuse(LeNet()))
    images, labels = (t.chunk(ranks)[rank] for t in data())
    F.cross_entropy(model(images), labels).backward()
    torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
