"""--shard: training all the weights of a model that does not fit one GPU together with its optimizer.

PyTorch's FSDP2 splits the master weights, their gradients and the optimizer over all processes: a weight takes 16 bytes
(fp32, gradient, two moments) over their number, and blocks are gathered one at a time where they are computed, forward
and backward. Beside it every process has a whole working copy to sample with, 2 bytes a weight in bf16, which is
refreshed in place after each step; with --beta, the reference takes another 2. Each process loads the whole model into
the machine's memory before it is split (4 bytes a weight).

With LoRA, or where the model fits, there is nothing to gain: then every process computes with its working copy, and
gradients alone are summed.
"""

import torch
from torch import Tensor

from model import PRECISIONS, HeadNorm, RMSNorm, Transformer, empty_model, refresh
from runtime import World, is_split, require


def check_shard(config, world: World) -> None:
    require(not config.shard or world.size > 1, "--shard needs several processes: torchrun --nproc-per-node N")
    require(not (config.shard and config.lora), "--shard splits the weights that are trained: it needs --lora 0")


def shard(model: Transformer, precision: str, world: World) -> Transformer:
    """Split the model, in place, and move it to the processes' devices; it then computes in `precision`. Returns the
    working copy."""
    from torch.distributed.device_mesh import init_device_mesh  # a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    lowered = MixedPrecisionPolicy(PRECISIONS[precision], torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, RMSNorm | HeadNorm):  # these stay fp32, as in a working copy
            fully_shard(module, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=lowered)
    fully_shard(model, mesh=mesh, mp_policy=lowered)
    model.computes_in = PRECISIONS[precision]
    copy = empty_model(model.config, PRECISIONS[precision], world.device)
    refresh(copy, model)
    return copy


def split_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor of a weight's shape, which all processes have, split as the weight is."""
    if not is_split(weight) or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(weight.device)
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
