"""--fsdp: train all the weights of a model that does not fit one GPU with its optimizer.

PyTorch's FSDP2 shards the master weights, their gradients and the optimizer over all processes: a
weight takes 16 bytes (fp32, gradient, two moments) divided by their number, and blocks are gathered
one at a time. Beside it every process holds a whole policy to sample with, 2 bytes a weight in bf16
synced in place after each step, and with --beta a reference (2 more). Each process loads the whole
model into CPU memory before it is sharded (4 bytes a weight).
"""

import torch
from torch import Tensor

from lib.distributed import World, is_dtensor
from lib.policy import DTYPES, empty_model, sync_weights
from lib.transformer import HeadNorm, RMSNorm, Transformer


def shard(model: Transformer, precision: str, world: World) -> Transformer:
    """Shard the model in place, to compute in `precision` ("fp32" or "bf16"); return the policy."""
    from torch.distributed.device_mesh import init_device_mesh  # a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, dtype = init_device_mesh(world.device.type, (world.world_size,)), DTYPES[precision]
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, RMSNorm | HeadNorm):  # these stay fp32, as in a policy
            fully_shard(module, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    model.compute_dtype = dtype
    policy = empty_model(model.config, dtype, world.device)
    policy.n_logits = model.n_logits
    sync_weights(policy, model)
    return policy


def shard_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Shard a tensor that all processes have, of a weight's shape, as the weight is sharded."""
    if not is_dtensor(weight) or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(weight.device)
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
