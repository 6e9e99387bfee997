// PyTorch's own operations as steps of a pass, as backends/triton/passes.py describes them.

#pragma once

#include <optional>
#include <string>

#include <c10/util/SmallVector.h>

#include "convolution.h"

namespace wn_kernels {

// Those of a pass, whose number seldom needs more memory than this.
using Tensors = c10::SmallVector<Tensor, 12>;

// `A B + bias` of two matrices, or of their transposes; the sums of columns or channels; or the
// gradient of a convolution's input.
class Operation {
 public:
  // The operation of a step: a function, the tensors that it takes, and the one that it returns.
  // Nothing for any other function.
  static std::optional<Operation> of(const py::tuple& step) {
    const py::object function = step[0];
    if (!py::hasattr(function, "operation")) return std::nullopt;
    Operation found;
    for (const auto& each : step[1]) found.given_.push_back(each.is_none() ? -1 : each.cast<int>());
    found.result_ = step[2].cast<py::tuple>()[0].cast<int>();
    const auto name = function.attr("operation").cast<std::string>();
    found.is_product_ = name == "product";
    if (name == "input_grad")
      found.conv_ = Geometry::of(function.attr("conv").cast<Geometry::Fields>());
    if (found.is_product_) {
      found.turns_a_ = function.attr("turns_a").cast<bool>();
      found.turns_b_ = function.attr("turns_b").cast<bool>();
    }
    return found;
  }

  // Takes the step. Called without the GIL.
  void operator()(Tensors& tensors) const {
    const Tensor& a = tensors[given_[0]];
    if (conv_) {
      const auto& [x, w] = std::tie(tensors[given_[1]], tensors[given_[2]]);
      tensors[result_] = std::get<0>(plain_grads(a, x, w, *conv_, true, false));
      return;
    }
    if (!is_product_) {
      tensors[result_] = bias_grad(a, 1);
      return;
    }
    const Tensor left = turns_a_ ? a.t() : a;
    const Tensor right = turns_b_ ? tensors[given_[1]].t() : tensors[given_[1]];
    if (given_.size() > 3) {  // a matrix that takes the product behind its first row
      Tensor into = tensors[given_[3]].narrow(0, 1, left.size(0));
      tensors[result_] = at::mm_out(into, left, right);
      return;
    }
    tensors[result_] = given_[2] < 0
        ? at::mm(left, right)
        : at::addmm(tensors[given_[2]].to(left.scalar_type()), left, right);
  }

 private:
  Operation() = default;

  std::vector<int> given_;  // -1 for no tensor
  int result_ = -1;
  std::optional<Geometry> conv_;  // of the convolution whose input's gradient it is
  bool is_product_ = false, turns_a_ = false, turns_b_ = false;
};

}  // namespace wn_kernels
