// The weights that a group has prepared for a forward of its model, and how a layer takes its own.
//
// modules/prepared.py states when a layer may, and does the same where this library is missing. Here
// are the steps that a forward repeats for every layer.

#pragma once

#include <ATen/SavedTensorHooks.h>
#include <c10/core/InferenceMode.h>

#include "call.h"

namespace wn_kernels {

// Returns the sum of the version counters, which tensors of inference mode do not have.
inline uint64_t versions_of(const Tensor& v, const Tensor& g) {
  return v.is_inference() || g.is_inference() ? 0 : uint64_t{v._version()} + g._version();
}

// Returns the lists of v and of g that are held at these of the places (dictionary, key of g, key of
// v), and the sums of their version counters. Returns nothing if one of them is missing or of another
// kind than torch's own, or if they are on several devices.
inline std::optional<std::tuple<py::list, py::list, std::vector<uint64_t>>> parameters(
    const py::list& places, const std::vector<size_t>& indices) {
  const size_t count = indices.size();
  py::list lists[2] = {py::list(count), py::list(count)};
  std::vector<uint64_t> versions(count);
  std::optional<at::Device> device;
  for (size_t k = 0; k < count; ++k) {
    PyObject* place = PyList_GET_ITEM(places.ptr(), indices[k]);
    PyObject* tensors[2];  // v, g
    for (const size_t part : {0, 1}) {
      PyObject* key = PyTuple_GET_ITEM(place, 2 - part);
      PyObject* found = item(PyTuple_GET_ITEM(place, 0), key);
      if (!found || !is_tensor(found)) return std::nullopt;
      const auto& own = THPVariable_Unpack(found).device();
      if (!device) device = own;
      if (own != *device) return std::nullopt;
      PyList_SET_ITEM(lists[part].ptr(), k, Py_NewRef(found));
      tensors[part] = found;
    }
    versions[k] = versions_of(THPVariable_Unpack(tensors[0]), THPVariable_Unpack(tensors[1]));
  }
  return std::make_tuple(std::move(lists[0]), std::move(lists[1]), std::move(versions));
}

// The weights of a forward in progress.
class Weights {
 public:
  // `v`, `g`, `versions` and `w` are those of the layers with these indices. In `seen`, which has a
  // byte for every layer, the bits 1 and 2 say that a layer wanted the group's weight, and that it had
  // a better way. What is decided about an input is `known`, and `decide(key, i, x, v, g, bias, dtype)`
  // adds to it.
  Weights(
      const std::vector<size_t>& indices, py::list v, py::list g, std::vector<uint64_t> versions,
      py::list w, py::bytearray seen, py::dict known, py::object decide)
      : mode_(Mode::now()), layers_(seen.size()), v_(std::move(v)), g_(std::move(g)),
        w_(std::move(w)), seen_(std::move(seen)), known_(std::move(known)),
        decide_(std::move(decide)) {
    for (size_t k = 0; k < indices.size(); ++k) {
      auto& layer = layers_.at(indices[k]);
      layer.v = PyList_GET_ITEM(v_.ptr(), k);
      layer.g = PyList_GET_ITEM(g_.ptr(), k);
      layer.w = PyList_GET_ITEM(w_.ptr(), k);
      layer.versions = versions[k];
    }
  }

  // Returns the weight of layer `i` for an input, if it is what the layer would compute. The arguments
  // are (i, x, v, g, bias).
  py::object take(PyObject* const* given) {
    const size_t i = PyLong_AsSize_t(given[0]);
    PyObject *input = given[1], *v = given[2], *g = given[3], *bias = given[4];
    const bool are_tensors = is_tensor(input) && is_tensor(v) && is_tensor(g) &&
                             (bias == Py_None || is_tensor(bias));
    if (!are_tensors || Mode::now() != mode_) return py::none();
    const Tensor& x = THPVariable_Unpack(input);
    const auto device = x.device();
    auto dtype = x.scalar_type();
    if (dtype != at::kDouble && at::autocast::is_autocast_available(device.type()) &&
        at::autocast::is_autocast_enabled(device.type()))
      dtype = at::autocast::get_autocast_dtype(device.type());
    else if (bias != Py_None && THPVariable_Unpack(bias).scalar_type() != dtype)
      return py::none();
    if (!shares(i, given, x, dtype)) return py::none();
    const auto& layer = layers_.at(i);
    if (!layer.w || v != layer.v || g != layer.g) return py::none();
    const auto &w = THPVariable_Unpack(layer.w), &own_v = THPVariable_Unpack(v),
               &own_g = THPVariable_Unpack(g);
    const bool is_recorded = !mode_.records || w.requires_grad() ||
                             !(own_v.requires_grad() || own_g.requires_grad());
    if (w.scalar_type() != dtype || w.device() != device || !is_recorded ||
        versions_of(own_v, own_g) != layer.versions)
      return py::none();
    return py::reinterpret_borrow<py::object>(layer.w);
  }

 private:
  // Whether gradients are recorded, inference mode is on, and hooks save tensors.
  struct Mode {
    bool records, infers, hooked;

    static Mode now() {
      const bool records = at::GradMode::is_enabled();
      return {records, c10::InferenceMode::is_enabled(),
              records && !at::SavedTensorDefaultHooks::get_tls_state().stack.empty()};
    }
    bool operator!=(const Mode& other) const {
      return records != other.records || infers != other.infers || hooked != other.hooked;
    }
  };

  // What a weight was computed from. There is no weight by default.
  struct Layer {
    PyObject *v = nullptr, *g = nullptr, *w = nullptr;
    uint64_t versions = 0;
  };

  // Returns whether the plan has layer `i` take the group's weight for this input, and notes it.
  bool shares(size_t i, PyObject* const* given, const Tensor& x, at::ScalarType dtype) {
    static thread_local Key key;
    key.clear();
    key.number(static_cast<uint32_t>(i));
    key.number(static_cast<char>(dtype));
    key.number(mode_.records);
    key.list(x.sizes());
    const py::bytes bytes(key.bytes());
    PyObject* found = item(known_.ptr(), bytes.ptr());
    const bool answer = found
        ? found == Py_True
        : decide_(bytes, i, py::handle(given[1]), py::handle(given[2]), py::handle(given[3]),
                  py::handle(given[4]), dtype).cast<bool>();
    PyByteArray_AS_STRING(seen_.ptr())[i] |= answer ? 1 : 2;
    return answer;
  }

  Mode mode_;
  std::vector<Layer> layers_;
  py::list v_, g_, w_;
  py::bytearray seen_;
  py::dict known_;
  py::object decide_;
};

// Returns `Weights::take` as a function of Python.
inline py::object taking(
    const std::vector<size_t>& indices, py::list v, py::list g, std::vector<uint64_t> versions,
    py::list w, py::bytearray seen, py::dict known, py::object decide) {
  static PyMethodDef take = method_of<Weights, &Weights::take, 5>("take");
  const auto weights = in_capsule(std::make_unique<Weights>(
      indices, std::move(v), std::move(g), std::move(versions), std::move(w), std::move(seen),
      std::move(known), std::move(decide)));
  return bound(take, weights);
}

}  // namespace wn_kernels
