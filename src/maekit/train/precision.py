"""In which arithmetic a pass runs: asked of the machine, never assumed.

Weights, optimizer and loss stay float32; `autocast` lets matrix products run in bfloat16 or float16. On a CPU whether
bfloat16 pays differs by a factor of fifty between machines, so `resolve_precision` asks the processor for its
instructions. It does not measure: the same command has to choose alike on a busy machine. ``maekit bench`` does.

torch's fused attention on a CPU has a backward pass that in bfloat16 takes six times as long as in float32 (PyTorch
2.14.1: half of the step of a small model), and its forward pass takes twice as long as the products that it is made of.
Inside `autocast` on a CPU, `attention` takes its place: matrix products, a few heads at a time so that logits stay in
the cache, as FlashAttention does by tiles (arXiv 2205.14135, section 3.1). Logits, softmax and sums are float32, so
that gradients are more exact than the fused one's. It keeps query, key and value, and torch.compile takes it as it is.

B images, H heads, T tokens, S tokens attended to, D width of a head.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError

log = logging.getLogger("maekit")

LEAST_WIDTH = 96
"""Encoder width from which bfloat16 is taken on a CPU that has it: there a step was 1.5 times as fast (AVX512-BF16,
28 px, patch 4). Below it a step is no matter of matrix products."""
LONGEST = 577
"""Tokens attended to (384 px in patches of 16) up to which `attention` was measured faster than the fused one; at 785
it is by one thread, and not by two."""
LOGITS = 2**19
"""Logits that there are at a time for each of up to 8 threads, or those of one head: 2 MiB of float32, about a core's
cache."""
FEWEST = 16
"""Logits of a token from which on torch's softmax is the faster one: it goes by vectors of 16 numbers."""


def resolve_precision(name: str, device: torch.device, width: int) -> str:
    """Turn "auto" into what the hardware does well, and say why; refuse what it cannot.

    Args:
        name: "auto" | "fp32" | "bf16" | "fp16".
        width: of the encoder.

    Raises:
        MaekitError: E-ENV-PRECISION for fp16 without CUDA, or bf16 on a GPU that lacks it.
    """
    if name == "auto":
        chosen, why = best_precision(device, width)
        log.info("precision %s: %s", chosen, why)
        return chosen
    if name == "fp16" and device.type != "cuda":
        raise MaekitError(
            "E-ENV-PRECISION", "setting precision", found=f"fp16 on {device.type}", hint="--precision auto"
        )
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise MaekitError(
            "E-ENV-PRECISION", "setting precision", found="bf16 on a GPU without it", hint="--precision fp16"
        )
    if name == "bf16" and device.type == "cpu" and not _cpu_does_bf16():
        log.warning("bf16 on this CPU (no AMX, no AVX512-BF16) is 5 to 14 times slower than fp32")
    return name


def best_precision(device: torch.device, width: int) -> tuple[str, str]:
    """Return the precision for an encoder of this width, and the reason in words."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16", f"compute capability {major}.{minor}"
    if device.type != "cpu":
        return "fp32", f"nothing else is tried on {device.type}"
    if not _cpu_does_bf16():
        return "fp32", "this CPU has neither AMX nor AVX512-BF16"
    if width < LEAST_WIDTH:
        return "fp32", f"an encoder {width} wide is too small for bf16 to pay"
    return "bf16", "this CPU has AMX" if torch.cpu.get_capabilities().get("amx_bf16") else "this CPU has AVX512-BF16"


def _cpu_does_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextlib.contextmanager
def autocast(precision: str, device: torch.device, *, keep_casts: bool = True) -> Iterator[None]:
    """Let a pass run at this precision: "fp32" changes nothing.

    The backward pass belongs inside, too: with activation checkpointing it computes forward passes again, which have to
    be the same ones.

    Args:
        keep_casts: weights in half precision stay until the end, for what is computed again, and with `kept_casts` for
            the next pass; without, they are cast when they are needed, and take no memory.
    """
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        yield
        return
    own = own_attention() if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, kinds[precision], cache_enabled=keep_casts), own:
        yield


def kept_casts(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While open, a weight that one pass has cast is not cast again for the next one.

    torch forgets casts where the outermost autocast ends; this one casts nothing by itself. The weights must stay as
    they are until its end.
    """
    return torch.autocast(device.type, enabled=False)


_mkldnn: Any = torch.backends.mkldnn
_one_at_a_time = threading.Lock()
_torchs = F.scaled_dot_product_attention


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """While open, torch's function is one that passes on to `attention` what that is faster at, whoever calls it.

    Encoders stay timm's, which look the function up when they need it. A mode of torch (`TorchFunctionMode`) would do
    the same, but is left for the time of a backward pass.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _is_ours(query, key, value, *args, **kwargs):
        return attention(query, key, value)
    return _torchs(query, key, value, *args, **kwargs)


def _is_ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> bool:
    plain = attn_mask is None and not dropout_p and not is_causal and not any(others.values())
    learns = torch.is_grad_enabled() and query.requires_grad
    usual = query.ndim == 4 and query.shape[-1] == value.shape[-1] and min(query.shape[2], key.shape[2]) > 0
    in_bf16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
    return plain and learns and usual and in_bf16 and key.shape[2] <= LONGEST


@torch.library.custom_op("maekit::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend: softmax(query key^T / sqrt(D)) value, on a CPU.

    Args:
        query: (B, H, T, D) bfloat16.
        key: (B, H, S, D) bfloat16.
        value: (B, H, S, D) bfloat16.

    Returns:
        (B, H, T, D).
    """
    out = _like(query)
    with torch.autocast("cpu", enabled=False):  # which would go on inside and round logits to bfloat16
        for part in _parts(query, key):
            q, k, v = (x[part].flatten(0, 1) for x in (query, key, value))
            out[part] = torch.bmm(_softmax(_in_float32(q, k)).to(v.dtype), v).view_as(out[part])
    return out


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _like(query)


@torch.library.custom_op("maekit::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; logits are computed again."""
    grads = _like(query), _like(key), _like(value)
    with torch.autocast("cpu", enabled=False):
        for part in _parts(query, key):
            g, q, k, v = (x[part].flatten(0, 1) for x in (grad, query, key, value))
            p = _softmax(_in_float32(q, k))
            s = _in_float32(g, v).mul_(p)
            s = s.addcmul_(p, s.sum(-1, keepdim=True), value=-1).to(g.dtype)
            for whole, one in zip(
                grads, (torch.bmm(s, k), torch.bmm(s.mT, q), torch.bmm(p.to(g.dtype).mT, g)), strict=True
            ):
                whole[part] = one.view_as(whole[part])
    return grads


@attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _like(tensor: Tensor) -> Tensor:
    """Return room for (B, H, T, D) in the order in which a layer before wants it: that of (B, T, H, D)."""
    b, h, t, d = tensor.shape
    return tensor.new_empty((b, t, h, d)).transpose(1, 2)


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield images and heads, as many as have `LOGITS` for each thread: whole images, or some heads of one."""
    batch, all_heads, tokens, _ = query.shape
    heads = max(1, min(torch.get_num_threads(), 8) * LOGITS // (tokens * key.shape[2]))
    images = max(1, heads // all_heads)
    for image in range(0, batch, images):
        for head in range(0, all_heads, heads):
            yield slice(image, image + images), slice(head, head + heads)


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T / sqrt(D), of bfloat16, in float32.

    The numbers are bfloat16's still, so a product by a processor's instructions for them, which sum in float32, loses
    nothing; torch gives it away only as a faster way to multiply what is float32 (PyTorch 2.14.1). That is a setting of
    the whole process: what another thread multiplies meanwhile in float32 may be rounded.
    """
    setting = _mkldnn.matmul
    with _one_at_a_time:
        before = setting.fp32_precision
        try:
            setting.fp32_precision = "bf16"
            return torch.bmm(a.float(), b.float().mT).mul_(a.shape[-1] ** -0.5)
        finally:
            setting.fp32_precision = before


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension; `logits` may be overwritten."""
    if logits.shape[-1] >= FEWEST:
        return logits.softmax(-1)
    p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad, *ctx.saved_tensors)


attention.register_autograd(_backward, setup_context=_keep)
