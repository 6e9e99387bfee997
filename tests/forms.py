"""Weight-normed layers in every form that a model may have them in, for the tests of what works on
whole models."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wn_kernels
from tests.convert.layers import NORMALISE
from wn_kernels.backends import reference
from wn_kernels.convert import fused

FORMS = ["ours", "weight_norm", "parametrizations", "fused weight_norm", "fused parametrizations"]

# A layer of torch.nn, its arguments, its options, `dim`, and its input's shape.
LAYERS = {
    "linear": (nn.Linear, (6, 5), {}, 0, (16, 6)),
    "linear, by input": (nn.Linear, (6, 5), {}, 1, (4, 4, 6)),
    "linear, whole": (nn.Linear, (6, 5), {}, None, (16, 6)),
    "1d": (nn.Conv1d, (6, 4, 3), {"stride": 2, "padding": 1}, 0, (5, 6, 9)),
    "1d, unbatched": (nn.Conv1d, (6, 4, 3), {"padding_mode": "reflect", "padding": 1}, 0, (6, 19)),
    "taps": (nn.Conv1d, (6, 4, 3), {"groups": 2}, 2, (5, 6, 9)),
    "2d": (nn.Conv2d, (3, 4, (3, 2)), {}, 0, (4, 3, 5, 6)),
    "3d": (nn.Conv3d, (2, 3, 2), {}, 0, (3, 2, 4, 3, 3)),
    "up": (nn.ConvTranspose1d, (6, 4, 4), {"stride": 2, "groups": 2}, 0, (5, 6, 7)),
    "up, by output": (nn.ConvTranspose1d, (6, 4, 4), {"stride": 2}, 1, (5, 6, 7)),
    "up 2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2}, 1, (3, 4, 4, 3)),
    "up 3d": (nn.ConvTranspose3d, (2, 3, 2), {}, 0, (3, 2, 3, 2, 3)),
}


def normalised(layer: nn.Module, form: str, dim: int | None = 0) -> nn.Module:
    """A layer of torch.nn with weight norm in one of the forms."""
    if form == "ours":
        options = {
            name: getattr(layer, name)
            for name in ("stride", "padding", "dilation", "groups", "padding_mode")
            if hasattr(layer, name)
        }
        if isinstance(layer, nn.Linear):
            sizes: tuple = (layer.in_features, layer.out_features)
        else:
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        options |= {"bias": layer.bias is not None, "dtype": layer.weight.dtype}
        ours = fused.LAYERS[type(layer)](*sizes, **options, dim=dim)
        ours.load_state_dict(layer.state_dict())
        return ours
    normed = NORMALISE[form.removeprefix("fused ")](layer, dim=dim)
    if form.startswith("fused"):
        wn_kernels.fuse(normed)
    return normed


def made(kind: str, form: str, dtype=torch.float64, **changes) -> tuple[nn.Module, Tensor]:
    """A layer whose `g` is not the norm, and an input whose mean is not zero."""
    torch.manual_seed(0)
    cls, arguments, options, dim, shape = LAYERS[kind]
    layer = normalised(cls(*arguments, **options | changes, dtype=dtype), form, dim)
    g, _ = parts(layer)
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
    return layer, torch.randn(shape, dtype=dtype) + 0.5


def parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """`(g, v)`."""
    if hasattr(layer, "weight_v"):
        return layer.weight_g, layer.weight_v
    originals = layer.parametrizations.weight
    return originals.original0, originals.original1


def effective(layer: nn.Module, dim: int | None) -> Tensor:
    """The layer's weight by the definition, in float64."""
    g, v = (t.detach().double() for t in parts(layer))
    return v * reference.slice_scale(v, g, dim, 0.0)


def plain(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the layer computes with a plain weight, in float64."""
    x = x.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    rank, padding = weight.ndim - 2, layer.padding
    if layer.transposed:
        function = getattr(F, f"conv_transpose{rank}d")
        return function(x, weight, bias, layer.stride, groups=layer.groups)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return getattr(F, f"conv{rank}d")(x, weight, bias, layer.stride, padding, groups=layer.groups)


def by_channel(layer: nn.Module, y: Tensor) -> Tensor:
    """`y` with a row for each output channel."""
    rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    return y.movedim(-1 - rank, 0).flatten(1)
