// This library computes weight-normalised layers on a CPU, as nodes of PyTorch's autograd graph. A
// call runs no Python.
//
// The layers serve dense tensors in float64, or in any mixture of float32, bfloat16 and float16. g has
// the dtype of V. Under autocast, x is cast first. Norms are those of the rows of V. A convolution's
// may also be those of its columns, and those of a weight alone may be of any slices. The variants are
// those of the ATen path (backends/aten.py) and `widen`. The profiler shows which one ran. A backward
// that is itself differentiated is recorded as W, PyTorch's own products, and (dV, dg) of dW.

#include "convolution.h"
#include "flat.h"
#include "group.h"
#include "kept.h"
#include "launched.h"
#include "linear.h"
#include "modules.h"
#include "prepared.h"
#include "recurrence.h"

#include <torch/csrc/Exceptions.h>

namespace wn_kernels {

// A layer on a CPU. Without a rank it is the weight alone.
inline MaybeTensor computed(
    int64_t rank, py::handle x, py::handle v, py::handle g, py::handle bias, py::handle geometry,
    py::handle dim, py::handle eps, py::handle norm) {
  if (rank < 0) return weight_norm(v, g, dim, eps, norm);
  if (rank == 0) return linear(x, v, g, bias, dim, eps, norm);
  return convolution(rank, x, v, g, bias, geometry, dim, eps, norm);
}

// Such a function for Python: (rank or None, x, v, g, bias, geometry, dim, eps, norm) -> y, or None. It
// has no table of overloads, as pybind11's functions have, which takes as long as a small allocation.
template <decltype(computed) serve>
PyObject* served(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "expected 9 arguments, got ", count);
  const int64_t rank = given[0] == Py_None ? -1 : PyLong_AsLongLong(given[0]);
  const auto y = serve(
      rank, given[1], given[2], given[3], given[4], given[5], given[6], given[7], given[8]);
  if (y) return THPVariable_Wrap(*y);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// `layer_operands` for Python: (module, rule) -> a tuple, or None.
PyObject* operands_of(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "expected 2 arguments, got ", count);
  return layer_operands(given[0], given[1]).release().ptr();
  END_HANDLE_TH_ERRORS
}

// `recurrence` for Python: its 11 arguments -> a tuple, or None.
PyObject* recurrence_of(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 11, "expected 11 arguments, got ", count);
  return recurrence(given).release().ptr();
  END_HANDLE_TH_ERRORS
}

// `slice_norm` for Python: (v, dim, norm) -> n, or None.
PyObject* slice_norm_of(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "expected 3 arguments, got ", count);
  if (const auto n = slice_norm(given[0], given[1], given[2])) return THPVariable_Wrap(*n);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <decltype(computed) serve>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(served<serve>), METH_FASTCALL, nullptr};
}

}  // namespace wn_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace wn_kernels;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#else
  m.attr("compiler") = "an unknown compiler";
#endif
  static PyMethodDef methods[] = {
      method<computed>("computed"), method<launched>("launched"),
      {"operands_of", reinterpret_cast<PyCFunction>(operands_of), METH_FASTCALL, nullptr},
      {"recurrence", reinterpret_cast<PyCFunction>(recurrence_of), METH_FASTCALL, nullptr},
      {"slice_norm", reinterpret_cast<PyCFunction>(slice_norm_of), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(m.ptr(), methods);
  m.def("weight_norms", &weight_norms);
  m.def("named_weights", &named_weights);
  m.def("placed_weights", &placed_weights);
  py::class_<Layout>(m, "Layout")
      .def(py::init([](int64_t size, Sizes offsets, std::vector<Sizes> shapes, bool is_zeroed) {
        return Layout{size, std::move(offsets), std::move(shapes), is_zeroed};
      }));
  py::class_<Frozen>(m, "Frozen")
      .def(py::init<const py::list&, const py::dict&, const py::dict&, const py::dict&>())
      .def("keep", &Frozen::keep)
      .def("take", &Frozen::take);
  m.def("layouts", &layouts);
  m.def("addresses", &addresses);
  m.def("empty_like", &wn_kernels::empty_like);
  m.def("record", &record);
  m.def("parameters", &parameters);
  m.def("taking", &taking);
  m.def("keeping", &keeping);
  m.def(
      "set_callbacks", [](py::object plan, py::object launches, py::object differentiable_grads,
                          py::object weight_grads_backward, py::object recurrence_grads,
                          std::vector<py::object> norms) {
        callbacks() = {
            std::move(plan), std::move(launches), std::move(differentiable_grads),
            std::move(weight_grads_backward), std::move(recurrence_grads), std::move(norms)};
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
    ++Kept::changes();
  });
}
