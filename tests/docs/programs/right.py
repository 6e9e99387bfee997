"""A program as a user might write it. Type checkers accept all of it in their strict modes."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import wn_kernels
import wn_kernels.functional as WF
from wn_kernels import (
    WNGRU,
    WNLSTM,
    WNRNN,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose1d,
    WNConvTranspose2d,
    WNConvTranspose3d,
    WNGRUCell,
    WNLazyConv1d,
    WNLazyConvTranspose2d,
    WNLazyLinear,
    WNLinear,
    WNLSTMCell,
    WNMeanOnlyBatchNorm1d,
    WNMeanOnlySyncBatchNorm,
    WNRNNCell,
)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = WNConv1d(3, width, 5, padding=2, padding_mode="reflect", eps=1e-6)
        self.norm = WNMeanOnlyBatchNorm1d(width, momentum=None)
        self.out = WNLinear(width, 2, dim=None, dtype=torch.float64, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(self.conv(x)).relu().mean(-1))
        return y


layers: list[nn.Module] = [
    WNLinear(3, 4, False, dim=-1, norm="linf", magnitude_preserving=True),
    WNConv1d(2, 4, (3,), stride=(2,), padding="same", dilation=1, groups=2, bias=False),
    WNConv2d(2, 4, (3, 5), 2, (1, 2), dim=1),
    WNConv3d(2, 4, (3, 1, 1), padding="valid"),
    WNConvTranspose1d(4, 2, 4, 2, 1, 0, 1, True, 1, "zeros", dim=1),
    WNConvTranspose2d(4, 2, 4, stride=(2, 1), output_padding=(1, 0)),
    WNConvTranspose3d(4, 2, 3, device=torch.device("meta")),
    WNLazyLinear(4, dim=1),
    WNLazyConv1d(4, 3, padding=1, magnitude_preserving=True),
    WNLazyConvTranspose2d(4, (3, 3), output_padding=0),
    WNLSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True, proj_size=2, dim=1),
    WNGRU(3, 4, 2, dropout=0.1, eps=1e-6),
    WNRNN(3, 4, nonlinearity="relu", dim=None, norm="l1"),
    WNLSTMCell(3, 4, bias=False),
    WNGRUCell(3, 4, dtype=torch.float32),
    WNRNNCell(3, 4, True, "relu"),
    WNMeanOnlySyncBatchNorm(3, affine=False, process_group=None),
]
linear: nn.Linear = WNLinear(3, 4)
lstm: nn.LSTM = WNLSTM(3, 4)
assert_type(WNLinear(3, 4).weight_v, nn.Parameter)
assert_type(WNConv2d(3, 4, 3).weight, Tensor)
assert_type(WNConv1d(3, 4, 3).dim, int | None)

assert_type(wn_kernels.weight_norm(nn.Linear(3, 4), dim=None), nn.Linear)
with wn_kernels.use_backend("aten"):
    layer = WNLinear(3, 4)
    v, g = layer.weight_v, layer.weight_g
    assert_type(WF.wn_linear(torch.ones(2, 3), v, g, layer.bias, dim=0), Tensor)
    assert_type(WF.weight_norm(v, g, dim=0, eps=1e-6), Tensor)

report = wn_kernels.fuse(Net(), dry_run=True)
names: list[str] = [line.name for line in report if line.dim == 0]
folded: list[str] = wn_kernels.fold(Net())
state: dict[str, Tensor] = wn_kernels.state_dict(Net(), "plain")
torch.save(state, Path("state.pt"))

model = Net()
unfused: list[str] = wn_kernels.unfuse(model)
optimizer = torch.optim.AdamW(wn_kernels.param_groups(model, weight_decay=0.1), lr=1e-3)
wn_kernels.renormalize_(model)
assert_type(wn_kernels.slice_norms(model), dict[str, Tensor])
with wn_kernels.frozen_weights(model):
    y: Tensor = model(torch.ones(2, 3, 7))
watch = wn_kernels.monitor(model, optimizer, every=2)
read = watch.read()
started = wn_kernels.init.data_dependent_(model, torch.ones(2, 3, 7))
tuned = wn_kernels.tune(model, torch.ones(2, 3, 7), seconds=0.1)
explained = wn_kernels.explain(model, (2, 3, 7), device="H100")
print(report, names, folded, unfused, read, started, tuned, explained, layers)
