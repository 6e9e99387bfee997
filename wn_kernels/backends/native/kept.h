// The weight that a layer keeps inside `frozen_weights`, for inputs that it had before.
//
// modules/kept.py states when a kept weight serves a call, and finds it. Here is what a call looks at
// where nothing has changed since an earlier one of such an input.

#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

#include "call.h"

namespace wn_kernels {

// Whether work for a device goes to its default stream, on which no graph is captured.
inline bool is_on_default_stream(const at::Device& device) {
  if (device.is_cpu()) return true;
  return device.is_cuda() &&
         c10::impl::VirtualGuardImpl(device.type()).getStream(device).id() == 0;
}

// Where the values of a tensor are, and how they lie. A change of its `.data` changes one of these.
struct Place {
  explicit Place(const Tensor& t)
      : address(reinterpret_cast<uintptr_t>(t.data_ptr())), sizes(t.sizes().vec()),
        strides(t.strides().vec()) {}

  bool is_of(const Tensor& t) const {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) == address && t.sizes() == sizes &&
           t.strides() == strides;
  }

  uintptr_t address;
  Sizes sizes, strides;
};

class Kept {
 public:
  // Returns what was added for such an input: W, or False if the layer does without it. Returns None
  // where Python has to look. The arguments are (x, v, g).
  py::object take(PyObject* const* given) {
    PyObject *x = given[0], *v = given[1], *g = given[2];
    if (!describe(x, v, g)) return py::none();
    for (const auto& entry : entries_) {
      if (entry.key != key_.bytes()) continue;
      if (!entry.v) return py::bool_(false);
      const Tensor &own_v = THPVariable_Unpack(v), &own_g = THPVariable_Unpack(g);
      const Tensor& w = THPVariable_Unpack(entry.w.ptr());
      const bool needs_grad =
          at::GradMode::is_enabled() && (own_v.requires_grad() || own_g.requires_grad());
      const bool is_current =
          entry.v.ptr() == v && entry.g.ptr() == g && !own_v.is_inference() && !own_g.is_inference() &&
          uint64_t{own_v._version()} + own_g._version() + w._version() == entry.versions &&
          entry.v_place->is_of(own_v) && entry.g_place->is_of(own_g);
      return is_current && !needs_grad ? entry.w : py::none();
    }
    return py::none();
  }

  // Adds W, or False, for such an input. The arguments are (x, v, g, w, versions, memory): the sum of
  // the version counters of v, g and w, and tensors that lie as v and g did when W was computed.
  py::object add(PyObject* const* given) {
    if (!describe(given[0], given[1], given[2])) return py::none();
    if (entries_.size() >= kMost_) entries_.clear();
    Entry entry{key_.bytes()};
    if (given[3] != Py_False) {
      const auto held = [&](size_t i) { return py::reinterpret_borrow<py::object>(given[i]); };
      entry.v = held(1), entry.g = held(2), entry.w = held(3);
      entry.versions = held(4).cast<uint64_t>();
      entry.v_place.emplace(THPVariable_Unpack(PyTuple_GET_ITEM(given[5], 0)));
      entry.g_place.emplace(THPVariable_Unpack(PyTuple_GET_ITEM(given[5], 1)));
    }
    entries_.push_back(std::move(entry));
    return py::none();
  }

  // Counts what makes every entry of every layer invalid.
  static uint64_t& changes() {
    static uint64_t count = 0;
    return count;
  }

 private:
  // The layer does without a weight if there is no v.
  struct Entry {
    std::string key;
    py::object v, g, w;
    uint64_t versions = 0;
    std::optional<Place> v_place, g_place;
  };

  // Describes an input in `key_`. Returns false for a call that Python has to look at.
  bool describe(PyObject* input, PyObject* v, PyObject* g) {
    if (changes_ != changes()) {
      entries_.clear();
      changes_ = changes();
    }
    if (!is_tensor(input) || !is_tensor(v) || !is_tensor(g) || !is_seen_by_nobody()) return false;
    const Tensor& x = THPVariable_Unpack(input);
    const auto device = x.device();
    if (device != THPVariable_Unpack(v).device() || !is_plain(x, device.type())) return false;
    if (!is_on_default_stream(device)) return false;
    const bool casts = at::autocast::is_autocast_enabled(device.type());
    key_.clear();
    key_.number(static_cast<char>(x.scalar_type()));
    key_.number(casts ? static_cast<int>(at::autocast::get_autocast_dtype(device.type())) : -1);
    key_.number(at::GradMode::is_enabled());
    key_.list(x.sizes());
    key_.list(x.strides());
    return true;
  }

  static constexpr size_t kMost_ = 16;
  std::vector<Entry> entries_;
  Key key_;
  uint64_t changes_ = 0;
};

// Returns `Kept::take` and `Kept::add` as functions of Python.
inline py::tuple keeping() {
  static PyMethodDef take = method_of<Kept, &Kept::take, 3>("take");
  static PyMethodDef add = method_of<Kept, &Kept::add, 6>("add");
  const auto entries = in_capsule(std::make_unique<Kept>());
  return py::make_tuple(bound(take, entries), bound(add, entries));
}

}  // namespace wn_kernels
