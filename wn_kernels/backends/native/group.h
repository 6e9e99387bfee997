// This file computes the weights of a group of layers in one call, and makes them one node of the
// graph.
//
// The rows of all weights are divided into pieces of similar size, which the threads share. A weight
// whose slices are not rows is a pass of its own (columns.h). On a GPU, Python launches the kernels of
// a group, and the functions at the end of this file do what it would do for every tensor by itself.

#pragma once

#include <torch/csrc/Dtype.h>

#include "nodes.h"
#include "passes.h"

namespace wn_kernels {

// A piece of a group: some of the rows of one weight.
struct Piece {
  size_t member;
  int64_t begin, end;
};

// Divides the rows of a weight into pieces.
inline void add_pieces(std::vector<Piece>& pieces, size_t member, int64_t count, int64_t length) {
  const int64_t step = grain(length);
  for (int64_t begin = 0; begin < count; begin += step)
    pieces.push_back({member, begin, std::min(begin + step, count)});
}

template <typename F>
void for_each_piece(const std::vector<Piece>& pieces, const F& f) {
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(pieces[i]);
  });
}

// Where a tensor that shares its memory with others may begin, in bytes. PyTorch allocates on a GPU in
// such steps, so that tensors take no more memory together than each by itself.
constexpr int64_t allocation_step = 512;

// Returns memory like that of tensors on one device, in these dtypes. `together`, those that are dense
// share one piece of memory. They are no views of each other.
inline variable_list memory_like(
    const variable_list& tensors, const std::vector<at::ScalarType>& dtypes, bool together) {
  const size_t count = tensors.size();
  std::vector<int64_t> begins(count);
  int64_t size = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!together || !tensors[i].is_non_overlapping_and_dense()) continue;
    begins[i] = size;
    const int64_t bytes = bytes_of(tensors[i], dtypes[i]);
    size += (bytes + allocation_step - 1) / allocation_step * allocation_step;
  }
  Tensor block;
  variable_list out;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& t = tensors[i];
    if (!together || !t.is_non_overlapping_and_dense()) {
      out.push_back(at::empty_like(t, t.options().dtype(dtypes[i])));
      continue;
    }
    if (!block.defined())
      block = at::empty({size}, t.options().dtype(at::kByte));
    out.push_back(placed(block, t, dtypes[i], begins[i]));
  }
  return out;
}

// The weights of a group, and their norms.
struct Group {
  variable_list v, g, w, n;
  std::vector<NormOptions> options;
  variable_list places;    // memory that every W is written to, or nothing
  bool is_lasting = true;  // whether W may have memory that the thread keeps
  bool needs_grad = false;

  // Adds a weight. Returns false if the library does not serve it.
  bool add(py::handle vi, py::handle gi, py::handle dim, py::handle eps, py::handle norm) {
    auto t = weight_operands(vi, gi, dim, eps, norm);
    if (!t) return false;
    needs_grad |= t->needs_grad();
    v.push_back(std::move(t->v));
    g.push_back(std::move(t->g));
    options.push_back(t->options);
    return true;
  }

  // Computes W in these dtypes, and n. Returns false if a norm is out of range.
  bool compute(const std::vector<at::ScalarType>& dtypes) {
    const size_t count = v.size();
    std::vector<Piece> pieces;
    w.resize(count);
    n.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const Extents e(v[i], g[i]);
      w[i] = !places.empty() ? places[i]
             : is_lasting    ? lasting_weight(v[i], dtypes[i])
                             : empty_as(v[i], dtypes[i]);
      if (e.columns) {
        const auto result = weight(w[i], v[i], g[i], options[i]);
        if (!result) return false;
        n[i] = result->second;
      } else {
        n[i] = empty_norms(v[i], g[i]);
        add_pieces(pieces, i, e.count, e.length);
      }
    }
    std::atomic<bool> in_range{true};
    for_each_piece(pieces, [&](const Piece& piece) {
      const size_t i = piece.member;
      if (!weight_rows(w[i], n[i], v[i], g[i], options[i], piece.begin, piece.end)) in_range = false;
    });
    return in_range;
  }

  // Returns the gradients of all V, and those of all g behind them. They are undefined where dW is.
  // dV takes the memory of a dW that nothing else refers to.
  variable_list grads(variable_list&& given) const {
    const size_t count = v.size();
    variable_list out(2 * count), dw(count);
    std::vector<Piece> pieces;
    for (size_t i = 0; i < count; ++i) {
      if (!given[i].defined()) continue;
      const Extents e(v[i], g[i]);
      auto &dv = out[i], &dg = out[count + i];
      if (e.columns) {
        std::tie(dv, dg) = weight_grads(given[i], v[i], g[i], n[i], options[i], is_free(given[i]));
      } else {
        std::tie(dw[i], dv, dg) = empty_weight_grads(given[i], v[i], g[i], is_free(given[i]));
        add_pieces(pieces, i, e.count, e.length);
      }
    }
    for_each_piece(pieces, [&](const Piece& piece) {
      const size_t i = piece.member;
      weight_grad_rows(
          out[i], out[count + i], dw[i], v[i], g[i], n[i], options[i], piece.begin, piece.end);
    });
    return out;
  }
};

// The node of a group. It is no `Function`, which takes no lists of tensors.
class WeightNorms : public torch::autograd::Node {
 public:
  // Makes W the outputs of a node. Its backward is that of the group, or `grads`, a function of the
  // lists (dW, V, g, n) that returns those of dV and dg.
  static void record(const Group& group, py::handle grads = {}) {
    const auto node = make_node<WeightNorms>();
    torch::autograd::edge_list edges;
    for (const auto* each : {&group.v, &group.g})
      for (const Tensor& t : *each) edges.push_back(torch::autograd::impl::gradient_edge(t));
    node->set_next_edges(std::move(edges));
    for (const auto* each : {&group.v, &group.g, &group.n})
      for (const Tensor& t : *each) node->saved_.emplace_back(t, /*is_output=*/false);
    node->options_ = group.options;
    if (grads) node->grads_ = node->references_.keep(py::reinterpret_borrow<py::object>(grads));
    for (const Tensor& w : group.w) torch::autograd::set_history(w, node);
  }

  std::string name() const override { return "wn_kernels::WeightNorms"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : saved_) each.reset_data();
  }

  variable_list apply(variable_list&& given) override {
    const size_t count = options_.size();
    Group group{{}, {}, {}, {}, options_};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < saved_.size(); ++i) {
        auto& list = i < count ? group.v : i < 2 * count ? group.g : group.n;
        list.push_back(saved_[i].unpack());
      }
    }
    variable_list out(2 * count), dw(count);
    const bool again = at::GradMode::is_enabled();
    for (size_t i = 0; i < count; ++i) {
      const bool needs_v = task_should_compute_output(i),
                 needs_g = task_should_compute_output(count + i);
      if (!given[i].defined() || !(needs_v || needs_g)) continue;
      const auto &v = group.v[i], &g = group.g[i];
      if (!is_plain(given[i], v.device().type())) {
        const auto all = composite_grads(
            given[i], {}, {}, v, g, std::nullopt, options_[i], {false, needs_v, needs_g});
        out[i] = all[1];
        out[count + i] = all[2];
      } else if (again) {
        const auto found = recorded(given[i], v, g, group.n[i], i);
        out[i] = found[0];
        out[count + i] = found[1];
      } else {
        dw[i] = std::move(given[i]);
      }
    }
    if (again) return out;
    const BelowAutograd below;
    auto grads = grads_ ? by_python(dw, group.v, group.g, group.n) : group.grads(std::move(dw));
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) out[i] = std::move(grads[i]);
    return out;
  }

 private:
  // The gradients by Python. The first of the weights has this index in the group.
  variable_list by_python(
      const variable_list& dw, const variable_list& v, const variable_list& g,
      const variable_list& n, size_t first = 0) const {
    variable_list out(2 * dw.size());
    std::vector<size_t> used;
    for (size_t i = 0; i < dw.size(); ++i)
      if (dw[i].defined()) used.push_back(i);
    if (used.empty()) return out;
    const py::gil_scoped_acquire gil;
    py::list lists[5];
    for (const size_t i : used) {
      size_t k = 0;
      for (const auto* each : {&dw, &v, &g, &n}) lists[k++].append((*each)[i]);
      lists[4].append(first + i);
    }
    const py::tuple found = grads_(lists[0], lists[1], lists[2], lists[3], lists[4]);
    const py::list dv = found[0], dg = found[1];
    for (size_t k = 0; k < used.size(); ++k) {
      out[used[k]] = dv[k].cast<Tensor>();
      out[dw.size() + used[k]] = dg[k].cast<Tensor>();
    }
    return out;
  }

  // (dV, dg) of one weight as part of the graph.
  variable_list recorded(
      const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n, size_t i) const {
    if (!grads_) return recorded_weight_grads(grad, v, g, n, options_[i]);
    const Tensor dw = as(grad, v.scalar_type());
    std::pair<Tensor, Tensor> result;
    {
      const BelowAutograd below;
      const at::NoGradGuard no_grad;
      const auto found = by_python({dw}, {v}, {g}, {n}, i);
      result = {found[0], found[1]};
    }
    return WeightGrads::apply(dw, v, g, n, result, Extents(v, g).axis, options_[i]);
  }

  std::vector<torch::autograd::SavedVariable> saved_;  // all V, all g, all n
  std::vector<NormOptions> options_;
  References references_;
  py::handle grads_;
};

// Returns dtypes as the library has them.
inline std::vector<at::ScalarType> dtypes_of(const py::list& dtypes) {
  std::vector<at::ScalarType> out;
  for (const auto each : dtypes) out.push_back(reinterpret_cast<THPDtype*>(each.ptr())->scalar_type);
  return out;
}

// Computes every W as an output of a node. Returns false if a norm is out of range.
inline bool form(Group& group, const std::vector<at::ScalarType>& dtypes) {
  const py::gil_scoped_release released;
  {
    const BelowAutograd below;
    if (!group.compute(dtypes)) return false;
  }
  if (group.needs_grad) WeightNorms::record(group);
  return true;
}

// Returns every W, in its dtype. If there are places, each is written to its own. Otherwise it may have
// memory that the thread keeps if it `is_lasting`. Returns nothing if the library does not serve one of
// them.
inline std::optional<variable_list> weight_norms(
    const py::list& v, const py::list& g, const py::list& dims, const py::list& eps,
    const py::list& dtypes, const py::list& norms, const std::optional<variable_list>& places,
    bool is_lasting) {
  Group group;
  if (places) group.places = *places;
  group.is_lasting = is_lasting;
  const auto of_w = dtypes_of(dtypes);
  for (size_t i = 0; i < v.size(); ++i) {
    if (!group.add(v[i], g[i], dims[i], eps[i], norms[i])) return std::nullopt;
    if ((of_w[i] == at::kDouble) != (group.v[i].scalar_type() == at::kDouble)) return std::nullopt;
  }
  if (!form(group, of_w)) return std::nullopt;
  return std::move(group.w);
}

// The parameters of a recurrent layer, by the names of its tensors. The parameters are `own`. `rules`
// has (key of g, key of v, dim, eps, norm) for the name of each W, and `holders` the parameters that
// have its g and v if these are not the layer's own.
struct Named {
  py::list names;
  py::dict own, rules, holders;

  static py::handle get(py::handle from, py::handle key) { return item(from.ptr(), key.ptr()); }

  // Calls `weight(i, v, g, rule)` for each W and `other(i, t)` for the rest. Returns false if a tensor
  // is missing, or not torch's own, or if one of these does.
  template <typename Weight, typename Other>
  bool each(const Weight& weight, const Other& other) const {
    for (size_t i = 0; i < names.size(); ++i) {
      const py::handle rule = get(rules, names[i]);
      if (!rule) {
        const py::handle t = get(own, names[i]);
        if (!t || !is_tensor(t) || !other(i, t)) return false;
        continue;
      }
      const py::handle holder = get(holders, names[i]);
      const py::handle from = holder ? holder : own;
      const py::handle g = get(from, PyTuple_GET_ITEM(rule.ptr(), 0));
      const py::handle v = get(from, PyTuple_GET_ITEM(rule.ptr(), 1));
      if (!g || !v || !is_tensor(g) || !is_tensor(v) || !weight(i, v, g, rule)) return false;
    }
    return true;
  }
};

// Returns the tensors of a layer by these names, and forms those that are weight-normed. Returns nothing
// if the library does not serve the call.
inline std::optional<py::list> named_weights(
    const py::list& names, const py::dict& own, const py::dict& rules, const py::dict& holders) {
  Group group;
  std::vector<at::ScalarType> dtypes;
  std::vector<size_t> formed;
  py::list out(names.size());
  const auto weight = [&](size_t i, py::handle v, py::handle g, py::handle rule) {
    const auto option = [&](size_t k) { return py::handle(PyTuple_GET_ITEM(rule.ptr(), k)); };
    if (!group.add(v, g, option(2), option(3), option(4))) return false;
    dtypes.push_back(group.v.back().scalar_type());
    formed.push_back(i);
    return true;
  };
  const auto other = [&](size_t i, py::handle t) {
    out[i] = t;
    return true;
  };
  if (!Named{names, own, rules, holders}.each(weight, other) || !form(group, dtypes))
    return std::nullopt;
  for (size_t k = 0; k < formed.size(); ++k)
    out[formed[k]] = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(group.w[k])));
  return out;
}

// --- for groups whose kernels Python launches ------------------------------------------------------

inline variable_list unpacked(const py::list& tensors) {
  variable_list out;
  for (const auto t : tensors) out.push_back(THPVariable_Unpack(t.ptr()));
  return out;
}

// Returns the dtypes and layouts of tensors on one device as bytes. Returns nothing if one of them is
// of another kind than torch's own, or if something sees through the call.
inline py::object layouts(const py::list& tensors) {
  Key key;
  std::optional<at::Device> device;
  for (const auto object : tensors) {
    if (!is_tensor(object)) return py::none();
    const Tensor& t = THPVariable_Unpack(object.ptr());
    if (!device) {
      device = t.device();
      if (!is_eager(device->type())) return py::none();
      key.number(t.get_device());
    }
    if (t.device() != *device || !is_floating(t.scalar_type()) || !is_plain(t, device->type()))
      return py::none();
    key.number(static_cast<char>(t.scalar_type()));
    key.list(t.sizes());
    key.list(t.strides());
  }
  return py::bytes(key.bytes());
}

// Returns the addresses of the tensors of these weights, as bytes: weight by weight, one of each list.
// The address of a tensor that is None is zero.
inline py::bytes addresses(const std::vector<py::list>& lists, const std::vector<size_t>& weights) {
  std::string bytes;
  bytes.reserve(lists.size() * weights.size() * sizeof(uintptr_t));
  for (const size_t i : weights) {
    for (const auto& each : lists) {
      PyObject* t = PyList_GET_ITEM(each.ptr(), i);
      const auto address =
          t == Py_None ? 0 : reinterpret_cast<uintptr_t>(THPVariable_Unpack(t).data_ptr());
      bytes.append(reinterpret_cast<const char*>(&address), sizeof address);
    }
  }
  return py::bytes(bytes);
}

// The same for Python.
inline py::list empty_like(const py::list& tensors, const py::list& dtypes, bool together) {
  const BelowAutograd below;
  py::list out;
  for (Tensor& t : memory_like(unpacked(tensors), dtypes_of(dtypes), together))
    out.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))));
  return out;
}

// Makes the weights W outputs of a node, whose backward is `grads`.
inline void record(
    const py::list& w, const py::list& v, const py::list& g, const py::list& n,
    const std::vector<double>& eps, const py::list& norms, const py::object& grads) {
  Group group{unpacked(v), unpacked(g), unpacked(w), unpacked(n)};
  for (size_t i = 0; i < eps.size(); ++i) group.options.push_back({eps[i], *norm_of(norms[i])});
  WeightNorms::record(group, grads);
}

}  // namespace wn_kernels
