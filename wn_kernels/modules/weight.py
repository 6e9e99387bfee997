"""These mixins give a layer weight-normalised weights. They handle parameters, reads of the weights
and assignments to them, initialisation and checkpoints. `NormedWeights` serves any number of
weights, and `WeightNormMixin` the layers whose one weight is named `weight`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from .. import functional as WF
from ..call import Norm, canonical_dim, canonical_eps, canonical_norm, kept_shape
from ..text import html
from . import checkpoints, kept, norms, prepared, reading, removal

# The entries are (v, g, bias, dim, eps, norm).
Operands = tuple[Tensor, Tensor, Tensor | None, int | None, float, Norm]


def _arguments(cls: type) -> list[inspect.Parameter]:
    """Returns the parameters of a class's constructor."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


def _option(name: str, default: Any, annotation: str) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _is_inference(t: Tensor) -> bool:
    """Returns whether a tensor, which may have no shape yet, was made under inference mode."""
    with torch._C.DisableTorchFunctionSubclass():
        return t.is_inference()


class NormedWeights(nn.Module):
    """This mixin is the base of every layer with weight-normalised weights.

    For each of its weights, the layer holds `<name>_v` (the direction) and `<name>_g` (the
    magnitude) instead of `<name>`. Reading the weight gives the current `g · V / ‖V‖`, which is
    differentiable. Assigning to it sets both.

    State dicts load in all three forms in use: `<name>_g` / `<name>_v`, PyTorch's
    `parametrizations.<name>.original0` / `original1`, and a plain `<name>`.
    """

    dim: int | None
    eps: float
    norm: Norm = "l2"  # that of a layer which an earlier version has pickled
    weight_ndim: int  # each class sets it
    plain: Any  # the class of torch.nn that the layer replaces
    _is_read = False  # see modules/reading.py
    _watches = reading.WATCHES
    _store: kept.Store | None = None  # see modules/kept.py
    _traced: Tensor | None = None  # see modules/prepared.py
    # These are the arguments that a mixin's constructor adds to those of the plain layer.
    _options: tuple[inspect.Parameter, ...] = (
        _option("dim", 0, "int | None"),
        _option("eps", 0.0, "float"),
        _option("norm", "l2", "Norm"),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives the constructor the signature of the plain layer, with our arguments added."""
        super().__init_subclass__(**kwargs)
        constructors = [c for c in cls.__mro__ if "__init__" in vars(c)]
        plain = constructors[constructors.index(NormedWeights) + 1]
        if "_options" not in vars(constructors[0]):  # the subclass has a constructor of its own
            arguments = _arguments(constructors[0])
        elif plain is not nn.Module:
            arguments = sorted([*_arguments(plain), *cls._options], key=lambda p: p.kind)
        else:  # the class is another mixin
            return
        cls.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]

    def __init__(
        self,
        *args: Any,
        dim: int | None = 0,
        eps: float = 0.0,
        norm: Norm = "l2",
        **kwargs: Any,
    ) -> None:
        # The plain layer's constructor assigns the weight, which needs these. They are set before
        # nn.Module's own constructor runs, and therefore without its __setattr__.
        self.__dict__["dim"] = canonical_dim(dim, self.weight_ndim)
        self.__dict__["eps"] = canonical_eps(eps)
        self.__dict__["norm"] = canonical_norm(norm)
        super().__init__(*args, **kwargs)
        self._normalise()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes of a copy, which keeps no weights of `frozen_weights`."""
        return {key: value for key, value in self.__dict__.items() if key != "_store"}

    def _normalise(self) -> None:
        """Puts the weights that the plain layer's constructor made under weight norm, unless they
        are already."""

    def _normed(self) -> tuple[str, ...]:
        """Returns the names of the weights that are weight-normed."""
        raise NotImplementedError

    def _is_claimed(self, name: str) -> bool:
        """Returns whether `g` or `v` is no parameter of the layer, as after pruning."""
        key_g, key_v = checkpoints.keys("weight_norm", name)
        return key_g not in self._parameters or key_v not in self._parameters

    def _form(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight in the dtype of `v`, or in a wider one."""
        g, v = self._tensors(name)
        wide = v if dtype is None else v.to(dtype)
        return WF.weight_norm(wide, g, dim=self.dim, eps=self.eps, norm=self.norm)

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Does what `nn.Module.apply` does. Writes of `fn` into a weight take effect."""
        return reading.apply(self, fn)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter of this name before it considers the property.
        if name not in self._normed():
            super().__setattr__(name, value)
            if name in ("dim", "eps", "norm"):
                prepared.forget_options()
                if (store := self._store) is not None:
                    store.clear()
            return
        g, v = self._tensors(name)
        checkpoints.assign(value, g, v, self.dim, self.eps, self.norm)
        reading.forget(self)

    def _bring_into_form(self, state_dict: dict[str, Any], prefix: str) -> None:
        names = self._normed()
        stored = {key for name in names for key in checkpoints.keys("weight_norm", name)}
        others = checkpoints.other_parameters(self, stored)
        options = self.dim, self.eps, self.norm
        for name in names:
            g, v = self._tensors(name)
            checkpoints.bring_into("weight_norm", state_dict, prefix, name, g, v, *options, others)

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
        return removal.parametrizations(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Does what `nn.Module.register_parameter` does. A weight replaces `g` and `v`."""
        if name in self._normed():
            removal.finish(self, name, None)
        else:
            super().register_parameter(name, param)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns `(g, v)`."""
        return norms.parts(self, *checkpoints.keys("weight_norm", name))

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
        cls = self._own_class()
        namespace = {"__module__": cls.__module__, "_is_exposed": True, name: reading.reader(name)}
        self.__class__ = type(cls.__name__, (cls,), namespace)
        g, v = self._tensors(name)
        return removal.baked(v, g, self.dim, self.eps, self.norm)

    def _bake(self, name: str, weight: Tensor | None = None) -> None:
        """Replaces `g` and `v` by a plain weight. The last one also gives the layer the class of
        torch.nn."""
        plain = self._plain_class()
        removal.check_held(self, name, self, checkpoints.keys("weight_norm", name))
        g, v = self._tensors(name)
        baked = removal.baked(v, g, self.dim, self.eps, self.norm)
        self._leave(name, plain)
        removal.place(self, name, baked)
        removal.detach(self, name)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses `torch.jit.script`, which cannot compile a weight that is computed. It fails for
        PyTorch's weight norm as well.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose weight is computed: "
            "call wn_kernels.fold(model) first, or use torch.jit.trace, torch.export or "
            "torch.compile"
        )

    def _leave(self, name: str, plain: type[nn.Module]) -> None:
        """Takes a weight from those that are weight-normed."""
        for option in self._options:
            self.__dict__.pop(option.name, None)
        self.__class__ = plain  # type: ignore[assignment]

    def extra_repr(self) -> str:
        eps = f", eps={self.eps}" if self.eps else ""
        norm = f", norm={self.norm!r}" if self.norm != "l2" else ""
        return f"{super().extra_repr()}, dim={self.dim}{eps}{norm}"

    def _repr_html_(self) -> str:
        """Returns the parameters as a table, which a notebook shows, above the layer's options."""
        rows = [("parameter", "shape", "dtype", "device", "trained")]
        for name, p in self.named_parameters():
            shape = "not known yet" if is_lazy(p) else "×".join(map(str, p.shape)) or "one number"
            dtype = str(p.dtype).removeprefix("torch.")
            rows.append((name, shape, dtype, str(p.device), "yes" if p.requires_grad else "no"))
        return html(rows, repr(self))


class WeightNormMixin(NormedWeights):
    """This mixin is the base of every layer whose one weight is named `weight`."""

    weight_v: nn.Parameter
    weight_g: nn.Parameter
    bias: Any  # an nn.Parameter or None; torch.nn declares it as one or the other
    magnitude_preserving = False
    _options = (*NormedWeights._options, _option("magnitude_preserving", False, "bool"))

    def __init__(
        self,
        *args: Any,
        magnitude_preserving: bool = False,
        **kwargs: Any,
    ) -> None:
        if magnitude_preserving:
            if kwargs.get("norm", "l2") != "l2":
                raise ValueError(
                    f"magnitude_preserving needs norm='l2', which ‖W‖ follows from, got "
                    f"norm={kwargs['norm']!r}"
                )
            self.__dict__["magnitude_preserving"] = True
        super().__init__(*args, **kwargs)

    def _adopt(self, v: nn.Parameter) -> None:
        """Uses the weight that the plain layer's constructor made as the direction."""
        removal.attach(self, ["weight"])
        self.weight_v = v
        is_trained = v.requires_grad and not self.magnitude_preserving
        if is_lazy(v):
            self.weight_g = UninitializedParameter(is_trained, device=v.device, dtype=v.dtype)
        else:
            g = v.new_empty(kept_shape(v.shape, self.dim))
            self.weight_g = nn.Parameter(g, requires_grad=is_trained)

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
        same values. With `magnitude_preserving`, `V` is drawn from the normal distribution, `g` is
        the constant of `_preserving_magnitude`, and the bias is zero."""
        if is_lazy(self.weight_v) or (
            isinstance(self, LazyModuleMixin) and not self.weight_v.numel()
        ):
            return
        if self.magnitude_preserving:
            nn.init.normal_(self.weight_v)
            nn.init.constant_(self.weight_g, self._preserving_magnitude())
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        with torch.no_grad():
            self.weight_g.copy_(checkpoints.magnitude(self.weight_v, self.dim, self.eps, self.norm))
        if self.bias is not None:
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.weight_v)
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def _preserving_magnitude(self: Any) -> float:
        """Returns the `g` with which outputs have the variance of independent inputs.

        Karras et al. 2024 (EDM2), equation (47), give each row of `W` the norm 1: `W` is
        `1 / √fan_in` times a `V` whose entries have unit magnitude. In general, with `N` entries of
        `g`, `‖W‖²` is the number of output channels. The outputs of a transposed convolution with
        strides `s` share it among the `∏ s` phases.

            g = √(out_channels · ∏ s / N)      which is 1 for `dim=0` of a layer not transposed
        """
        is_transposed = getattr(self, "transposed", False)
        outputs = self.out_channels if hasattr(self, "out_channels") else self.out_features
        phases = math.prod(self.stride) if is_transposed else 1
        return math.sqrt(outputs * phases / max(1, self.weight_g.numel()))

    def _operands(self) -> Operands | None:
        """Returns the operands of `forward`, or `None` if it has to use the weight as a tensor. It
        avoids `nn.Module.__getattr__`, which costs 1 µs per parameter."""
        if self._is_read:
            reading.warn_of_writes(self)
        own = self._parameters
        v, g = own.get("weight_v"), own.get("weight_g")
        if v is None or g is None or "bias" not in own:  # one is parametrized or pruned
            return self.weight_v, self.weight_g, self.bias, self.dim, self.eps, self.norm
        return v, g, own["bias"], self.dim, self.eps, self.norm

    # A method: a `W` that was prepared for this call of `forward`.
    _prepared_weight = prepared.take

    @property
    def weight(self) -> Tensor:
        """Returns the weight `g · V / ‖V‖`, computed by each read and differentiable."""
        return reading.read(self, "weight")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and (is_lazy(value) or not hasattr(self, "weight_v")):
            self._adopt(value)
        else:
            super().__setattr__(name, value)

    def _normed(self) -> tuple[str, ...]:
        return ("weight",)

    def _normalisation(self) -> tuple[int | None, float, Norm]:
        """Returns `(dim, eps, norm)`."""
        return self.dim, self.eps, self.norm

    def _held(self) -> tuple[dict[str, Any], str, str]:
        """Returns where `g` and `v` are held: a dictionary and their keys."""
        return self._parameters, "weight_g", "weight_v"

    def extra_repr(self) -> str:
        preserving = ", magnitude_preserving=True" if self.magnitude_preserving else ""
        return f"{super().extra_repr()}{preserving}"
