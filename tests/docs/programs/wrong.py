"""Mistakes, each of which a type checker reports on its line."""

import torch
from torch import nn

import wn_kernels
import wn_kernels.functional as WF

wn_kernels.WNLinear(3, "4")
wn_kernels.WNLinear(3, 4, dim="rows")
wn_kernels.WNLinear(3)
wn_kernels.WNLinear(3, 4, magnitude=True)
wn_kernels.WNLinear(3, 4, eps=None)
wn_kernels.WNConv1d(3, 4, 3, norm="l3")
wn_kernels.WNGRUCell(3, 4, norm=1)
wn_kernels.WNConv1d(3, 4, (3, 3))
wn_kernels.WNConv2d(3, 4, 3, padding="same", padding_mode="mirror")
wn_kernels.WNConv3d(3, 4, 3, magnitude_preserving="yes")
wn_kernels.WNConvTranspose1d(3, 4, 3, padding="same")
wn_kernels.WNConvTranspose2d(3, 4, (3, 3, 3))
wn_kernels.WNLazyLinear(3, in_features=4)
wn_kernels.WNLazyConv2d(3)
wn_kernels.WNLazyConvTranspose1d(3, 3, stride="2")
wn_kernels.WNLSTM(3, 4, num_layers="two")
wn_kernels.WNLSTM(3, 4, nonlinearity="relu")
wn_kernels.WNGRU(3, 4, proj_size=2)
wn_kernels.WNRNN(3, 4, magnitude_preserving=True)
wn_kernels.WNLSTMCell(3, 4, num_layers=2)
wn_kernels.WNRNNCell(3, 4, eps="small")
wn_kernels.WNMeanOnlyBatchNorm1d("3")
wn_kernels.WNMeanOnlySyncBatchNorm(3, process_group=0)
wn_kernels.fuse(3)
wn_kernels.fold(nn.Linear(3, 4), torch.ones(3))
wn_kernels.state_dict(nn.Linear(3, 4), "folded")
wn_kernels.use_backend("cuda")
wn_kernels.weight_norm(nn.Linear(3, 4), dim="0")
wn_kernels.remove_weight_norm("conv")
wn_kernels.monitor(nn.Linear(3, 4), 0.1)
wn_kernels.tune(nn.Linear(3, 4))
wn_kernels.explain(nn.Linear(3, 4), 3)
wn_kernels.renormalize_(nn.Linear(3, 4), "max")
WF.wn_linear("x", None, None)
WF.weight_norm(torch.ones(3, 4), torch.ones(3), 0)
