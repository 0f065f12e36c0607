"""A model's weights by name, themselves and not copies."""

from __future__ import annotations

from torch import Tensor, nn

from hvdtrain.backends.watched import without_compile


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's floating-point and complex parameters and persistent buffers, each once, though it may have several names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                found.setdefault(
                    tensor.data_ptr() or id(tensor), (without_compile(f"{prefix}.{name}" if prefix else name), tensor)
                )
    return dict(found.values())
