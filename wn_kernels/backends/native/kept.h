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
      if (entry.key != key_) continue;
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
  void add(PyObject* const* given) {
    if (!describe(given[0], given[1], given[2])) return;
    if (entries_.size() >= kMost_) entries_.clear();
    Entry entry{key_};
    if (given[3] != Py_False) {
      const auto held = [&](size_t i) { return py::reinterpret_borrow<py::object>(given[i]); };
      entry.v = held(1), entry.g = held(2), entry.w = held(3);
      entry.versions = held(4).cast<uint64_t>();
      entry.v_place.emplace(THPVariable_Unpack(PyTuple_GET_ITEM(given[5], 0)));
      entry.g_place.emplace(THPVariable_Unpack(PyTuple_GET_ITEM(given[5], 1)));
    }
    entries_.push_back(std::move(entry));
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
    key_.clear();
    const auto number = [&](int64_t n) {
      key_.append(reinterpret_cast<const char*>(&n), sizeof n);
    };
    number(static_cast<int64_t>(x.scalar_type()));
    const bool casts = at::autocast::is_autocast_enabled(device.type());
    number(casts ? static_cast<int64_t>(at::autocast::get_autocast_dtype(device.type())) : -1);
    number(at::GradMode::is_enabled());
    for (const int64_t n : x.sizes()) number(n);
    for (const int64_t n : x.strides()) number(n);
    return true;
  }

  static constexpr size_t kMost_ = 16;
  std::vector<Entry> entries_;
  std::string key_;
  uint64_t changes_ = 0;
};

// Returns `Kept::take` and `Kept::add` as functions of Python. They have no tables of overloads
// (library.cpp).
inline py::tuple keeping() {
  static constexpr const char* name = "wn_kernels.Kept";
  static constexpr auto kept = [](PyObject* self) {
    return static_cast<Kept*>(PyCapsule_GetPointer(self, name));
  };
  static PyMethodDef take = {
      "take",
      reinterpret_cast<PyCFunction>(+[](PyObject* self, PyObject* const* given, Py_ssize_t count)
                                        -> PyObject* {
        HANDLE_TH_ERRORS
        TORCH_CHECK_TYPE(count == 3, "expected 3 arguments, got ", count);
        return kept(self)->take(given).release().ptr();
        END_HANDLE_TH_ERRORS
      }),
      METH_FASTCALL, nullptr};
  static PyMethodDef add = {
      "add",
      reinterpret_cast<PyCFunction>(+[](PyObject* self, PyObject* const* given, Py_ssize_t count)
                                        -> PyObject* {
        HANDLE_TH_ERRORS
        TORCH_CHECK_TYPE(count == 6, "expected 6 arguments, got ", count);
        kept(self)->add(given);
        Py_RETURN_NONE;
        END_HANDLE_TH_ERRORS
      }),
      METH_FASTCALL, nullptr};
  auto entries = std::make_unique<Kept>();
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
      entries.get(), name, [](PyObject* self) { delete kept(self); }));
  if (!capsule) throw py::error_already_set();
  entries.release();
  const auto function = [&](PyMethodDef* method) {
    return py::reinterpret_steal<py::object>(PyCFunction_New(method, capsule.ptr()));
  };
  return py::make_tuple(function(&take), function(&add));
}

}  // namespace wn_kernels
