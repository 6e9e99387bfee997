// This library computes weight-normalised layers on a CPU, as nodes of PyTorch's autograd graph. A
// call runs no Python.
//
// The layers serve dense tensors in float64, or in any mixture of float32, bfloat16 and float16. g has
// the dtype of V. Under autocast, x is cast first. Norms are those of the rows of V. A convolution's
// may also be those of its columns, and those of a weight alone may be of any slices. The variants are
// those of the ATen path (backends/aten.py) and `widen`. The profiler shows which one ran. A backward
// that is itself differentiated is recorded as W, PyTorch's own products, and (dV, dg) of dW.

#include "convolution.h"
#include "group.h"
#include "launched.h"
#include "linear.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace wn_kernels;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#else
  m.attr("compiler") = "an unknown compiler";
#endif
  m.def("weight_norm", &weight_norm);
  m.def("weight_norms", &weight_norms);
  m.def("layouts", &layouts);
  m.def("addresses", &addresses);
  m.def("empty_like", &wn_kernels::empty_like);
  m.def("record", &record);
  m.def("linear", &linear);
  m.def("convolution", &convolution);
  m.def("launched", &launched);
  m.def(
      "set_callbacks", [](py::object plan, py::object launches, py::object differentiable_grads,
                          py::object weight_grads_backward) {
        callbacks() = {
            std::move(plan), std::move(launches), std::move(differentiable_grads),
            std::move(weight_grads_backward)};
      });
  py::class_<Kernel>(m, "Kernel").def(
      "__call__", [](const Kernel& kernel, uintptr_t stream, int device,
                     const std::vector<uint64_t>& addresses) {
        const py::gil_scoped_release released;
        Driver::find()->ensure_context(device);
        kernel(addresses.data(), addresses.size(), reinterpret_cast<void*>(stream));
      });
  m.def("kernel", [](const py::handle& kernel) {
    return Driver::find() ? std::make_unique<Kernel>(kernel) : nullptr;
  });
  m.def("forget", [] {
    plans().forget();
    launches_memo().forget();
  });
}
