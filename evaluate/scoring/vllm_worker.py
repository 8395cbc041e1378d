"""What runs in vLLM's own processes: digests of the weights that a worker holds."""

import hashlib
from contextlib import suppress
from typing import Any


def keep_plain_weights() -> None:
    """Let vLLM's CPU backend keep its weights as they are, instead of packing copies of them.

    Packed copies cannot be exchanged: vLLM drops the parameters of linear layers, and a tied head
    goes on with the old embeddings. On GPUs nothing is packed. Call it before a model is loaded.
    """
    import torch
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    def plain(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = plain


class WorkerExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    def digest_of_weights(self) -> str:
        """Return the SHA-256 of all parameters and buffers that this worker holds."""
        import torch

        digest = hashlib.sha256()
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


with suppress(ImportError):  # a worker imports this file before it loads a model
    keep_plain_weights()
