// The tensors of a recurrent layer on a GPU, in one piece of memory, as modules/flat.py describes.

#pragma once

#include "group.h"
#include "kept.h"

namespace wn_kernels {

// Where the tensors of a layer lie in one piece of memory, and their shapes. Offsets and the size are
// in elements.
struct Layout {
  int64_t size;
  Sizes offsets;
  std::vector<Sizes> shapes;
  bool is_zeroed;

  // Memory for tensors of these shapes. The pieces are no views of each other.
  variable_list pieces(const variable_list& tensors) const {
    const auto options = tensors[0].options().requires_grad(false);
    const Tensor block = is_zeroed ? at::zeros({size}, options) : at::empty({size}, options);
    variable_list out;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto bytes = offsets[i] * static_cast<int64_t>(block.element_size());
      out.push_back(placed(block, tensors[i], block.scalar_type(), bytes));
    }
    return out;
  }
};

// Copies of tensors at their places, as the outputs of a node.
class Placed : public torch::autograd::Node {
 public:
  static void record(const variable_list& places, const variable_list& tensors) {
    const auto node = make_node<Placed>();
    torch::autograd::edge_list edges;
    for (const Tensor& t : tensors) edges.push_back(torch::autograd::impl::gradient_edge(t));
    node->set_next_edges(std::move(edges));
    for (const Tensor& place : places) torch::autograd::set_history(place, node);
  }

  std::string name() const override { return "wn_kernels::Placed"; }

  variable_list apply(variable_list&& grads) override { return std::move(grads); }
};

// Returns the tensors of a layer in one piece of memory, those that are weight-normed by the launches
// of `prepare(v, g, options)`, a `Prepared` of backends/triton/group.py or None. Returns nothing where
// Python serves the layer.
inline std::optional<py::list> placed_weights(
    const py::list& names, const py::dict& own, const py::dict& rules, const py::dict& holders,
    const Layout& layout, const py::object& prepare) {
  const size_t count = names.size();
  if (layout.shapes.size() != count) return std::nullopt;
  variable_list like(count);  // v of every W, and the other tensors
  std::vector<size_t> formed;
  Group group;
  py::list v_list, g_list, options[4];
  std::optional<at::Device> device;
  const auto fits = [&](size_t i, const Tensor& t) {
    if (!device) {
      device = t.device();
      if (!is_eager(device->type())) return false;
    }
    like[i] = t;
    return t.device() == *device && is_plain(t, device->type()) && t.is_contiguous() &&
           is_floating(t.scalar_type());
  };
  const auto weight = [&](size_t i, py::handle v, py::handle g, py::handle rule) {
    const Tensor& scale = THPVariable_Unpack(g.ptr());
    if (!fits(i, scale) || !fits(i, THPVariable_Unpack(v.ptr()))) return false;
    formed.push_back(i);
    group.v.push_back(like[i]);
    group.g.push_back(scale);
    v_list.append(v);
    g_list.append(g);
    const auto option = [&](size_t k) { return py::handle(PyTuple_GET_ITEM(rule.ptr(), k)); };
    options[0].append(option(2));
    options[1].append(option(3));
    options[2].append(py::none());
    options[3].append(option(4));
    const auto norm = norm_of(option(4));
    if (!norm) return false;
    group.options.push_back({option(3).cast<double>(), *norm});
    return true;
  };
  const auto other = [&](size_t i, py::handle t) { return fits(i, THPVariable_Unpack(t.ptr())); };
  if (!Named{names, own, rules, holders}.each(weight, other) || formed.empty()) return std::nullopt;
  for (size_t i = 0; i < count; ++i)
    if (like[i].scalar_type() != like[0].scalar_type() ||
        like[i].sizes() != at::IntArrayRef(layout.shapes[i]))
      return std::nullopt;
  const py::object prepared = prepare(
      v_list, g_list,
      py::make_tuple(
          py::tuple(options[0]), py::tuple(options[1]), py::tuple(options[2]),
          py::tuple(options[3])));
  if (prepared.is_none()) return std::nullopt;

  const bool enabled = at::GradMode::is_enabled();
  const auto needs = [&](const variable_list& tensors) {
    return enabled && std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
             return t.requires_grad();
           });
  };
  const bool records = needs(group.v) || needs(group.g);
  variable_list places;
  {
    const at::NoGradGuard no_grad;
    {
      const BelowAutograd below;
      places = layout.pieces(like);
    }
    py::list of_weights;
    for (const size_t i : formed) of_weights.append(py::cast(places[i]));
    const py::tuple found = prepared(v_list, g_list, of_weights, records, false);
    group.w = unpacked(found[0]);
    if (records) group.n = unpacked(found[1]);
  }
  if (records) WeightNorms::record(group, prepared.attr("grads"));
  for (size_t k = 0; k < formed.size(); ++k) like[formed[k]] = group.w[k];

  variable_list to, from;
  for (size_t i = 0; i < count; ++i) {
    if (like[i].data_ptr() == places[i].data_ptr()) {
      places[i] = like[i];
    } else {
      to.push_back(places[i]);
      from.push_back(like[i]);
    }
  }
  if (!to.empty()) {
    {
      const at::NoGradGuard no_grad;
      const BelowAutograd below;
      at::_foreach_copy_(to, from);
    }
    if (needs(from)) Placed::record(to, from);
  }
  py::list out;
  for (Tensor& t : places)
    out.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))));
  return out;
}

// --- inside frozen_weights -------------------------------------------------------------------------

// The tensors of a layer for calls without gradients, and the parameters that they come from.
class Frozen {
 public:
  // Notes the parameters. What comes from them is kept afterwards.
  Frozen(
      const py::list& names, const py::dict& own, const py::dict& rules, const py::dict& holders) {
    const auto add = [&](py::handle t) { return this->add(t); };
    is_valid_ = Named{names, own, rules, holders}.each(
        [&](size_t, py::handle v, py::handle g, py::handle) { return add(v) && add(g); },
        [&](size_t, py::handle t) { return add(t); });
    is_valid_ = is_valid_ && !sources_.empty() && is_on_default_stream(sources_[0].device());
  }

  void keep(py::list tensors) {
    tensors_ = std::move(tensors);
    versions_ = versions_of_tensors();
  }

  // The tensors, or nothing if one of the parameters has changed, or if Python has to look at the call.
  std::optional<py::list> take(
      const py::list& names, const py::dict& own, const py::dict& rules, const py::dict& holders) {
    size_t next = 0;
    const auto same = [&](py::handle t) {
      return next < sources_.size() && sources_[next++].is_still(t);
    };
    const bool found = is_valid_ && at_changes_ == Kept::changes() && !tensors_.empty() &&
        versions_of_tensors() == versions_ &&  // nobody has written into one
        Named{names, own, rules, holders}.each(
            [&](size_t, py::handle v, py::handle g, py::handle) { return same(v) && same(g); },
            [&](size_t, py::handle t) { return same(t); });
    if (!found || next != sources_.size()) return std::nullopt;
    const auto device = sources_[0].device();
    if (!is_eager(device.type()) || !is_on_default_stream(device)) return std::nullopt;
    return py::list(tensors_[py::slice(0, static_cast<py::ssize_t>(tensors_.size()), 1)]);
  }

 private:
  struct Source {
    py::object object;
    uint64_t version;
    Place place;

    at::Device device() const { return THPVariable_Unpack(object.ptr()).device(); }

    bool is_still(py::handle t) const {
      if (!object.is(t)) return false;
      const Tensor& tensor = THPVariable_Unpack(t.ptr());
      return tensor._version() == version && place.is_of(tensor) &&
             !(at::GradMode::is_enabled() && tensor.requires_grad());
    }
  };

  bool add(py::handle t) {
    const Tensor& tensor = THPVariable_Unpack(t.ptr());
    if (tensor.is_inference()) return false;
    sources_.push_back({py::reinterpret_borrow<py::object>(t), tensor._version(), Place(tensor)});
    memory_.push_back(tensor.detach());
    return true;
  }

  uint64_t versions_of_tensors() const {
    uint64_t sum = 0;
    for (const auto t : tensors_) sum += THPVariable_Unpack(t.ptr())._version();
    return sum;
  }

  bool is_valid_;
  uint64_t versions_ = 0;
  uint64_t at_changes_ = Kept::changes();
  std::vector<Source> sources_;
  variable_list memory_;  // no other tensor gets these addresses
  py::list tensors_;
};

}  // namespace wn_kernels
