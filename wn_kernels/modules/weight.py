"""This mixin gives a layer a weight-normalised weight. It handles parameters, `.weight`,
initialisation and checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from .. import functional as WF
from ..call import canonical_dim, canonical_eps, kept_shape
from . import checkpoints, kept, prepared, reading, removal

# The entries are (v, g, bias, dim, eps).
Operands = tuple[Tensor, Tensor, Tensor | None, int | None, float]


def _arguments(cls: type) -> list[inspect.Parameter]:
    """Returns the parameters of a class's constructor."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


_OPTIONS = [
    inspect.Parameter("dim", inspect.Parameter.KEYWORD_ONLY, default=0, annotation="int | None"),
    inspect.Parameter("eps", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation="float"),
]


def _is_inference(t: Tensor) -> bool:
    """Returns whether a tensor, which may have no shape yet, was made under inference mode."""
    with torch._C.DisableTorchFunctionSubclass():
        return t.is_inference()


class WeightNormMixin(nn.Module):
    """This mixin is the base of every weight-normalised layer.

    The layer holds `weight_v` (the direction) and `weight_g` (the magnitude) instead of `weight`.
    Reading `.weight` gives the current weight `g · V / ‖V‖`, which is differentiable. Assigning to
    it sets both.

    State dicts load in all three forms in use: `weight_g` / `weight_v`, PyTorch's
    `parametrizations.weight.original0` / `original1`, and a plain `weight`.
    """

    weight_v: nn.Parameter
    weight_g: nn.Parameter
    bias: Any  # an nn.Parameter or None; torch.nn declares it as one or the other
    dim: int | None
    eps: float
    weight_ndim: int  # each class sets it
    plain: Any  # the class of torch.nn that the layer replaces
    _is_read = False  # see modules/reading.py
    _watches = reading.WATCHES
    _store: kept.Store | None = None  # see modules/kept.py
    _traced: Tensor | None = None  # see modules/prepared.py

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives the constructor the signature of the plain layer, with our two arguments added."""
        super().__init_subclass__(**kwargs)
        constructors = [c for c in cls.__mro__ if "__init__" in vars(c)]
        plain = constructors[constructors.index(WeightNormMixin) + 1]
        if constructors[0] is not WeightNormMixin:  # the subclass has a constructor of its own
            arguments = _arguments(constructors[0])
        elif plain is not nn.Module:
            arguments = sorted([*_arguments(plain), *_OPTIONS], key=lambda p: p.kind)
        else:  # the class is another mixin
            return
        cls.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, dim: int | None = 0, eps: float = 0.0, **kwargs: Any) -> None:
        # The plain layer's constructor assigns the weight, which needs these two. They are set
        # before nn.Module's own constructor runs, and therefore without its __setattr__.
        self.__dict__["dim"] = canonical_dim(dim, self.weight_ndim)
        self.__dict__["eps"] = canonical_eps(eps)
        super().__init__(*args, **kwargs)

    def _adopt(self, v: nn.Parameter) -> None:
        """Uses the weight that the plain layer's constructor made as the direction."""
        removal.attach(self, ["weight"])
        self.weight_v = v
        if is_lazy(v):
            self.weight_g = UninitializedParameter(device=v.device, dtype=v.dtype)
        else:
            g = v.new_empty(kept_shape(v.shape, self.dim))
            self.weight_g = nn.Parameter(g, requires_grad=v.requires_grad)

    def _materialize(self, shape: tuple[int, ...], outputs: int) -> None:
        """Gives a lazy layer's parameters their shapes and values."""
        with torch.inference_mode(_is_inference(self.weight_v)), torch.no_grad():
            self.weight_v.materialize(shape)  # type: ignore[attr-defined]
            self.weight_g.materialize(kept_shape(shape, self.dim))  # type: ignore[attr-defined]
            if self.bias is not None:
                self.bias.materialize((outputs,))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters as the plain layer does. From the same seed, `.weight` has the
        same values."""
        if is_lazy(self.weight_v) or (
            isinstance(self, LazyModuleMixin) and not self.weight_v.numel()
        ):
            return
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        with torch.no_grad():
            self.weight_g.copy_(WF.slice_norm(self.weight_v, dim=self.dim))
        if self.bias is not None:
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.weight_v)
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def _operands(self) -> Operands | None:
        """Returns the operands of `forward`, or `None` if it has to use the weight as a tensor. It
        avoids `nn.Module.__getattr__`, which costs 1 µs per parameter."""
        if self._is_read:
            reading.warn_of_writes(self)
        own = self._parameters
        v, g = own.get("weight_v"), own.get("weight_g")
        if v is None or g is None or "bias" not in own:  # one is parametrized or pruned
            return self.weight_v, self.weight_g, self.bias, self.dim, self.eps
        return v, g, own["bias"], self.dim, self.eps

    def _prepared_weight(
        self, input: Tensor, v: Tensor, g: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Returns a `W` that was prepared for this call of `forward`, in the dtype of its product
        with `input`, or `None` if the layer computes its own. The other arguments are those of
        `_operands`."""
        return prepared.take(self, input, v, g, bias)

    def _is_claimed(self, name: str) -> bool:
        """Returns whether the weight depends on more than two parameters of the layer."""
        return not {"weight_g", "weight_v"} <= self._parameters.keys()

    def _form(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight in the dtype of `v`, or in a wider one."""
        v = self.weight_v if dtype is None else self.weight_v.to(dtype)
        return WF.weight_norm(v, self.weight_g, dim=self.dim, eps=self.eps)

    @property
    def weight(self) -> Tensor:
        """Returns the weight `g · V / ‖V‖`, computed by each read and differentiable."""
        return reading.read(self, "weight")

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Does what `nn.Module.apply` does. Writes of `fn` into `.weight` take effect."""
        return reading.apply(self, fn)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter of this name before it considers the property.
        if name != "weight":
            super().__setattr__(name, value)
            if name == "eps" and self._store is not None:
                self._store.kept.clear()
        elif is_lazy(value) or not hasattr(self, "weight_v"):
            self._adopt(value)
        else:
            checkpoints.assign(value, self.weight_g, self.weight_v, self.dim)
            reading.forget(self)

    def _bring_into_form(self, state_dict: dict[str, Any], prefix: str) -> None:
        v, g, bias = self.weight_v, self.weight_g, {"bias": self.bias}
        checkpoints.bring_into("weight_norm", state_dict, prefix, "weight", g, v, self.dim, bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._bring_into_form(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    @property
    def parametrizations(self) -> nn.ModuleDict:
        """Returns the parametrizations of other tensors. If there are none, it returns a substitute
        for PyTorch's removal function."""
        own: Any = self.__dict__.get("_modules", {}).get("parametrizations")
        return removal.Parametrizations(self) if own is None else own

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Does what `nn.Module.register_parameter` does. A weight replaces `g` and `v`."""
        if name == "weight":
            removal.finish(self, name, None)
        else:
            super().register_parameter(name, param)

    def _normed(self) -> tuple[str, ...]:
        return ("weight",)

    def _tensors(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Returns `(g, v)`."""
        return self.weight_g, self.weight_v

    def _normalisation(self) -> tuple[int | None, float]:
        """Returns `(dim, eps)`."""
        return self.dim, self.eps

    def _held(self) -> tuple[dict[str, Any], str, str]:
        """Returns where `g` and `v` are held: a dictionary and their keys."""
        return self._parameters, "weight_g", "weight_v"

    def _own_class(self) -> type:
        """Returns the layer's class without the subclass that `_expose` adds."""
        return type(self).__bases__[0] if "_is_exposed" in vars(type(self)) else type(self)

    def _is_own(self) -> bool:
        """Returns whether the class is one of this package, which names its plain class."""
        return "plain" in vars(self._own_class())

    def _plain_class(self) -> type[nn.Module]:
        """Returns the class of the layer without weight norm.

        Raises:
            TypeError: the layer's class derives from one of this package.
        """
        if not self._is_own():
            raise TypeError(
                f"{self._own_class().__name__} derives from a layer of wn_kernels: its class "
                "without weight norm is not known"
            )
        return self.plain

    def _expose(self, name: str) -> nn.Parameter:
        """Gives the layer a class of its own, from which the property may be deleted."""
        self._plain_class()
        cls = type(self)
        namespace = {"__module__": cls.__module__, "_is_exposed": True, "weight": cls.weight}
        if "_is_exposed" not in vars(cls):
            self.__class__ = type(cls.__name__, (cls,), namespace)
        return removal.baked(self.weight_v, self.weight_g, self.dim, self.eps)

    def _bake(self, name: str = "weight", weight: Tensor | None = None) -> None:
        """Replaces `g` and `v` by a plain weight, and the class by that of torch.nn."""
        plain = self._plain_class()
        removal.check_held(self, "weight", self, checkpoints.keys("weight_norm", "weight"))
        baked = removal.baked(self.weight_v, self.weight_g, self.dim, self.eps)
        self.__class__ = plain  # type: ignore[assignment]
        del self.__dict__["dim"], self.__dict__["eps"]
        removal.place(self, name, baked)
        removal.detach(self, name)

    def extra_repr(self) -> str:
        eps = f", eps={self.eps}" if self.eps else ""
        return f"{super().extra_repr()}, dim={self.dim}{eps}"
