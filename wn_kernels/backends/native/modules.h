// What the `forward` of a fused layer takes from its module (convert/fused.py).

#pragma once

#include <array>

#include "call.h"

namespace wn_kernels {

// The attributes of an object. They live as long as the object.
inline PyObject* attributes(PyObject* object) {
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) throw py::error_already_set();
  return PyDict_Check(dict.ptr()) ? dict.ptr() : nullptr;
}

// The names of attributes that are looked up.
struct Names {
  PyObject* operator[](const char* name) const { return PyUnicode_InternFromString(name); }
  PyObject *parameters = (*this)["_parameters"], *modules = (*this)["_modules"],
           *parametrizations = (*this)["parametrizations"], *weight = (*this)["weight"],
           *bias = (*this)["bias"], *first = (*this)["0"], *is_read = (*this)["_is_read"],
           *forward = (*this)["forward"];
  std::array<PyObject*, 4> hooks{
      (*this)["_forward_pre_hooks"], (*this)["_forward_hooks"], (*this)["_backward_pre_hooks"],
      (*this)["_backward_hooks"]};
};

// Whether a module runs nothing but the `forward` of its class.
inline bool is_bare(PyObject* own, const Names& names) {
  for (PyObject* key : names.hooks) {
    PyObject* hooks = item(own, key);
    if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks)) return false;
  }
  return !item(own, names.forward);
}

// Returns (v, g, bias, dim, eps, norm), or None where Python has to look. `rule` is (key of g, key of
// v, dim, eps, norm, parametrization, hooks, list): the class of PyTorch's parametrization if that holds
// g and v, or None if the module does, dictionaries of the hooks of all modules, and the class of
// PyTorch's list of parametrizations.
inline py::object layer_operands(PyObject* module, PyObject* rule) {
  static const auto* const names = new Names;
  const auto option = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(rule, i); };
  PyObject* const own = attributes(module);
  if (!own) return py::none();
  PyObject* const is_read = item(own, names->is_read);
  PyObject* const parameters = item(own, names->parameters);
  if (!parameters || (is_read && is_read != Py_False)) return py::none();
  PyObject* holder = parameters;
  if (PyObject* const kind = option(5); kind != Py_None) {
    PyObject *at = item(own, names->modules), *list = nullptr;
    for (PyObject* key : {names->parametrizations, names->weight}) {
      PyObject* const child = at ? item(at, key) : nullptr;
      PyObject* const inner = child && child != Py_None ? attributes(child) : nullptr;
      if (!inner) return py::none();
      at = item(inner, names->modules);
      list = child, holder = inner;
    }
    // `is_claimed` of convert/fused.py states what must not be there.
    PyObject* const first = at && PyDict_Size(at) == 1 ? item(at, names->first) : nullptr;
    PyObject* const of_first = first && Py_TYPE(first) == reinterpret_cast<PyTypeObject*>(kind)
                                   ? attributes(first)
                                   : nullptr;
    if (!of_first || Py_TYPE(list) != reinterpret_cast<PyTypeObject*>(option(7)) ||
        !is_bare(holder, *names) || !is_bare(of_first, *names))
      return py::none();
    PyObject* const everywhere = option(6);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(everywhere); ++i)
      if (PyDict_Size(PyTuple_GET_ITEM(everywhere, i))) return py::none();
    holder = item(holder, names->parameters);
    if (!holder) return py::none();
  }
  PyObject *const g = item(holder, option(0)), *const v = item(holder, option(1)),
           *const bias = item(parameters, names->bias);
  if (!g || !v || !bias || g == Py_None || v == Py_None) return py::none();
  return py::reinterpret_steal<py::object>(
      PyTuple_Pack(6, v, g, bias, option(2), option(3), option(4)));
}

}  // namespace wn_kernels
