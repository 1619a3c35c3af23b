"""A base that fits no single GPU: each process holds its share of every frozen layer (torch's FSDP2).

The layers are gathered one at a time, for the forward and for the backward pass, and given up again. The adapter stays
whole in every process, summed by DistributedDataParallel as without shares: it is small, and so its optimizer, its
checkpoints and an exact continuation are what they are without. Accelerate's FSDP, which the Trainer would take, shares
the adapter out too, gathers the whole model at every checkpoint, and does not exist on processors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lib.models.loading import causal_model


def shard(model: Any, device: torch.device, size: int) -> None:
    """Leave a PeftModel its share of the frozen layers, on the process's device, and everything else whole.

    Embedding and output layer stay whole: they are often one tensor, and the loss works with it in parts.

    Args:
        model: on the processor; changed in place. size: number of processes.
    """
    decoder, mesh = causal_model(model).get_decoder(), init_device_mesh(device.type, (size,))
    whole = {weights for weights in model.parameters() if weights.requires_grad}
    whole |= {*causal_model(model).get_input_embeddings().parameters()}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *causal_model(model).get_output_embeddings().parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device)
    frozen = [name for name, weights in model.named_parameters() if not weights.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen
