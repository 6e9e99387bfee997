// This file computes a recurrent layer over a sequence, from the products of its inputs.
//
// With W = s V, the recurrent product is q_t = s (V h_{t-1}) + b: no W is formed. The gates are
// functions of p_t = W_ih x_t + b_ih, which is given, and of q_t (cells.h). The rows of V are packed
// once (packed_rows.h), and a step takes one read of them. The threads share the units, each with its
// gates' rows, which stay in its own cache from one step to the next.
//
// The backward goes through the steps in reverse. With dq_t, the gradient of q_t,
//
//   dh_{t-1} = (s dq_t) V + its part through the cell,   dV, dg from dW = sum_t dq_tᵀ h_{t-1}
//
// A thread computes dh_{t-1} and then dq_{t-1} of its own units: the columns of V that belong to them.

#pragma once

#include "cells.h"
#include "linear.h"
#include "packed_rows.h"

namespace wn_kernels {

// The tensors of a recurrent layer in one direction. Those that a call lacks are undefined.
struct Sequence {
  Cell cell;
  bool reversed;
  Tensor p;              // (T, B, gates * H): p_t, and after a recorded forward the values of the gates
  Tensor h0, c0;         // (B, H)
  Tensor v, g, n, bias;  // (gates * H, H); g, and with it n, is undefined if V is the weight
  Tensor y, c;           // (T, B, H): h_t and c_t
  Tensor q;              // (T, B, H) of a recorded gru: q_t of its third gate

  int64_t steps() const { return p.size(0); }
  int64_t batch() const { return p.size(1); }
  int64_t units() const { return v.size(1); }

  // The scales of the rows of V.
  Tensor scales() const { return g.defined() ? g.view(-1) / n.view(-1) : at::ones({v.size(0)}, v.options()); }
};

// Calls f(first unit, end) for the units of each thread. A thread takes whole panels.
template <typename T, typename F>
void for_each_part(const Sequence& of, const F& f) {
  const int64_t units = of.units(), panels = (units + kPanel<T> - 1) / kPanel<T>;
  const int64_t work = of.v.size(0) / units * kPanel<T> * units * of.batch();
  at::parallel_for(0, panels, grain(work), [&](int64_t begin, int64_t end) {
    f(begin * kPanel<T>, std::min(end * kPanel<T>, units));
  });
}

// --- forward -------------------------------------------------------------------------------------

// Computes y and c, and q and the values of the gates if they are recorded.
template <Cell cell, typename T>
void run_forward(const Sequence& of, bool recorded) {
  constexpr int64_t gates = gates_of(cell);
  const int64_t steps = of.steps(), batch = of.batch(), units = of.units(), row = gates * units;
  const Tensor scales = of.scales(),
               bias = of.bias.defined() ? of.bias : at::zeros({row}, of.v.options());
  const auto *vs = of.v.const_data_ptr<T>(), *scale = scales.const_data_ptr<T>(),
             *shift = bias.const_data_ptr<T>();
  T *ps = of.p.mutable_data_ptr<T>(), *ys = of.y.mutable_data_ptr<T>(),
    *cs = of.c.defined() ? of.c.mutable_data_ptr<T>() : nullptr,
    *qs = of.q.defined() ? of.q.mutable_data_ptr<T>() : nullptr;
  const auto *h0 = of.h0.const_data_ptr<T>(),
             *c0 = of.c0.defined() ? of.c0.const_data_ptr<T>() : nullptr;
  // Steps read the state before from one and write the new one to the other.
  Panels<T> states[] = {{units, batch}, {units, batch}};
  pack(h0, states[0]);
  states[1].zero_rest();
  // The rows of V that belong to a panel of units, for each gate.
  const int64_t panels = states[0].count, block = panels * kPanel<T> * kPanel<T>;
  const std::unique_ptr<T[]> packed(new T[gates * panels * block]);
  const auto rows_of = [&](int64_t gate, int64_t unit) {
    return packed.get() + (gate * panels + unit / kPanel<T>) * block;
  };
  for_each_part<T>(of, [&](int64_t first, int64_t end) {
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t unit = first; unit < end; unit += kPanel<T>)
        pack_rows(
            rows_of(gate, unit), vs + (gate * units + unit) * units,
            std::min(kPanel<T>, end - unit), units);
  });
  const T *h_before = h0, *c_before = c0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t t = of.reversed ? steps - 1 - step : step;
    const Panels<T>& from = states[step % 2];
    Panels<T>& to = states[1 - step % 2];
    T *p = ps + t * batch * row, *y = ys + t * batch * units,
      *c = cs ? cs + (of.c.dim() > 2 ? t * batch * units : 0) : nullptr,
      *q = qs ? qs + t * batch * units : nullptr;
    for_each_part<T>(of, [&](int64_t first, int64_t end) {
      // The products of a panel of units with each gate's rows of V, of which each column of h has kPanel.
      const int64_t size = batch * kPanel<T>;
      std::vector<T> products(gates * size);
      for (int64_t top = first; top < end; top += kPanel<T>) {
        const int64_t width = std::min(kPanel<T>, end - top);
        std::fill(products.begin(), products.end(), T(0));
        for (int64_t k = 0; k < gates; ++k)
          packed_product(products.data() + k * size, rows_of(k, top), width, from);
        for (int64_t b = 0; b < batch; ++b)
          for_each_vector<T>(width, [&](int64_t i, auto count) {
            const int64_t unit = top + i, at = b * units + unit;
            T* a = p + b * row + unit;
            const auto of_h = [&](int64_t k) {
              const T* product = products.data() + k * size + b * kPanel<T> + i;
              const int64_t j = k * units + unit;
              return multiply_add(load(product), load(scale + j, count), load(shift + j, count));
            };
            const auto gate = [&](int64_t k) { return load(a + k * units, count) + of_h(k); };
            const auto keep = [&](int64_t k, Vector<T> value) {
              if (recorded) store(a + k * units, value, count);
            };
            Vector<T> h;
            if constexpr (cell == Cell::lstm) {
              const auto in = sigmoid(gate(0)), forget = sigmoid(gate(1)), fresh = tangent(gate(2)),
                         out = sigmoid(gate(3));
              const auto state = forget * load(c_before + at, count) + in * fresh;
              h = out * tangent(state);
              store(c + at, state, count);
              keep(0, in), keep(1, forget), keep(2, fresh), keep(3, out);
            } else if constexpr (cell == Cell::gru) {
              const auto of_fresh = of_h(2);
              const auto reset = sigmoid(gate(0)), update = sigmoid(gate(1)),
                         fresh = tangent(load(a + 2 * units, count) + reset * of_fresh);
              h = fresh + update * (load(h_before + at, count) - fresh);
              if (recorded) store(q + at, of_fresh, count);
              keep(0, reset), keep(1, update), keep(2, fresh);
            } else if constexpr (cell == Cell::tanh) {
              h = tangent(gate(0));
            } else {
              h = gate(0) < T(0) ? Vector<T>{} : gate(0);  // a NaN stays
            }
            store(y + at, h, count);
            store(to.element(unit, b), h, count);
          });
      }
    });
    h_before = y, c_before = c;
  }
}

// --- backward ------------------------------------------------------------------------------------

// The gradients of a sequence. Those that are not needed are undefined.
struct SequenceGrads {
  Tensor p, q;  // of p_t and q_t, (T, B, gates * H); they are one tensor unless r scales q
  Tensor h0, c0;
};

// Computes the gradients of the products and of the first state, from those of y and of the last
// state, which may be undefined.
template <Cell cell, typename T>
void run_backward(
    const Sequence& of, const SequenceGrads& grads, const Tensor& dy, const Tensor& dh_n,
    const Tensor& dc_n) {
  constexpr int64_t gates = gates_of(cell);
  const int64_t steps = of.steps(), batch = of.batch(), units = of.units(), row = gates * units;
  const Tensor scales = of.scales();
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  const T *vs = pointer(of.v), *scale = pointer(scales), *ps = pointer(of.p), *ys = pointer(of.y),
          *cs = pointer(of.c), *qs = pointer(of.q), *h0 = pointer(of.h0), *c0 = pointer(of.c0),
          *dys = pointer(dy);
  T *dps = grads.p.mutable_data_ptr<T>(), *dqs = grads.q.mutable_data_ptr<T>();
  // What goes on to the step before by the cell: the gradients of c, or of h by z.
  const Tensor past = dh_n.defined() ? dh_n.clone(at::MemoryFormat::Contiguous)
                                     : at::zeros({batch, units}, of.v.options());
  const Tensor past_c = cell != Cell::lstm ? Tensor()
                        : dc_n.defined()   ? dc_n.clone(at::MemoryFormat::Contiguous)
                                           : at::zeros({batch, units}, of.v.options());
  T *dhs = past.mutable_data_ptr<T>(),
    *dcs = past_c.defined() ? past_c.mutable_data_ptr<T>() : nullptr;
  Panels<T> dh(units, batch);
  // These hold s dq of each gate, for the step that is computed and for the one before.
  using D = std::vector<Panels<T>>;
  D scaled[2];
  for (D& each : scaled) {
    each.reserve(gates);
    for (int64_t k = 0; k < gates; ++k) each.emplace_back(units, batch);
  }
  // All steps read a copy of V. For each panel of units it has the elements of all rows, one row after the
  // other, padded with zeros.
  const std::unique_ptr<T[]> copied(new T[dh.count * row * kPanel<T>]);
  const auto copy_of = [&](int64_t unit) { return copied.get() + unit * row; };
  for_each_part<T>(of, [&](int64_t first, int64_t end) {
    for (int64_t unit = first; unit < end; unit += kPanel<T>) {
      T* to = copy_of(unit);
      const int64_t width = std::min(kPanel<T>, end - unit);
      if (width < kPanel<T>) std::fill_n(to, row * kPanel<T>, T(0));
      for (int64_t j = 0; j < row; ++j) std::copy_n(vs + j * units + unit, width, to + j * kPanel<T>);
    }
  });
  // dh = (s dq) V, for the columns of some units.
  const auto product = [&](int64_t first, int64_t end, const D& d) {
    for (int64_t unit = first; unit < end; unit += kPanel<T>) {
      T* to = dh.element(unit, 0);
      std::fill_n(to, batch * kPanel<T>, T(0));
      for (int64_t k = 0; k < gates; ++k)
        packed_product(
            to, copy_of(unit) + k * units * kPanel<T>, std::min(kPanel<T>, end - unit), d[k]);
    }
  };
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t t = of.reversed ? steps - 1 - step : step, before = of.reversed ? t + 1 : t - 1;
    const int64_t slab = batch * units;
    const T *p = ps + t * batch * row, *y = ys + t * slab, *c = cs ? cs + t * slab : nullptr,
            *q = qs ? qs + t * slab : nullptr, *grad = dys ? dys + t * slab : nullptr,
            *h_before = step ? ys + before * slab : h0, *c_before = step && cs ? cs + before * slab : c0;
    T *dp = dps + t * batch * row, *dq = dqs + t * batch * row;
    const D& later = scaled[(step + 1) % 2];
    D& now = scaled[step % 2];
    for_each_part<T>(of, [&](int64_t first, int64_t end) {
      if (step < steps - 1) product(first, end, later);
      for (int64_t b = 0; b < batch; ++b)
        for_each_vector<T>(end - first, [&](int64_t i, auto count) {
          const int64_t unit = first + i, at = b * units + unit;
          const T* a = p + b * row + unit;
          const auto gate = [&](int64_t k) { return load(a + k * units, count); };
          Vector<T> d = load(dhs + at, count);
          if (step < steps - 1) d += load(dh.element(unit, b), count);
          if (grad) d += load(grad + at, count);
          const auto write = [&](int64_t k, Vector<T> of_p, Vector<T> of_q) {
            const int64_t j = k * units + unit;
            store(dp + b * row + j, of_p, count);
            if (dq != dp) store(dq + b * row + j, of_q, count);
            store(now[k].element(unit, b), of_q * load(scale + j, count), count);
          };
          Vector<T> passed{};
          if constexpr (cell == Cell::lstm) {
            const auto in = gate(0), forget = gate(1), fresh = gate(2), out = gate(3);
            const auto tanh = tangent(load(c + at, count));
            const auto dc = load(dcs + at, count) + d * out * (1 - tanh * tanh);
            const auto of = [&](int64_t k, Vector<T> value) { write(k, value, value); };
            of(0, dc * fresh * in * (1 - in));
            of(1, dc * load(c_before + at, count) * forget * (1 - forget));
            of(2, dc * in * (1 - fresh * fresh));
            of(3, d * tanh * out * (1 - out));
            store(dcs + at, dc * forget, count);
          } else if constexpr (cell == Cell::gru) {
            const auto reset = gate(0), update = gate(1), fresh = gate(2);
            const auto dn = d * (1 - update) * (1 - fresh * fresh);
            const auto dr = dn * load(q + at, count) * reset * (1 - reset);
            const auto dz = d * (load(h_before + at, count) - fresh) * update * (1 - update);
            write(0, dr, dr), write(1, dz, dz), write(2, dn, dn * reset);
            passed = d * update;
          } else {
            const auto h = load(y + at, count);
            Vector<T> da;
            if constexpr (cell == Cell::tanh)
              da = d * (1 - h * h);
            else
              da = h <= T(0) ? Vector<T>{} : d;
            write(0, da, da);
          }
          store(dhs + at, passed, count);
        });
    });
  }
  if (grads.c0.defined()) grads.c0.copy_(past_c);
  if (!grads.h0.defined()) return;
  for_each_part<T>(of, [&](int64_t first, int64_t end) { product(first, end, scaled[0]); });
  unpack(dh, grads.h0.mutable_data_ptr<T>());
  if (cell == Cell::gru) grads.h0.add_(past);
}

// --- the node ------------------------------------------------------------------------------------

// The tensors that p was computed from: x, V, g and the bias of the input's product. g is undefined if
// V is the weight.
using InputProduct = std::array<Tensor, 4>;

class Recurrence : public torch::autograd::Node {
 public:
  // Makes y, h_n and c_n outputs of the node, in this order.
  static void record(
      const Sequence& of, const InputProduct& input, const NormOptions& options, bool own,
      const variable_list& outputs) {
    const auto node = make_node<Recurrence>(of, input, options, own);
    node->set_next_edges(
        torch::autograd::collect_next_edges(of.p, of.h0, of.c0, of.v, of.g, of.bias));
    for (const Tensor& t : outputs) torch::autograd::set_history(t, node);
  }

  Recurrence(
      const Sequence& of, const InputProduct& input, const NormOptions& options, bool own)
      : cell_(of.cell), reversed_(of.reversed), own_(own), options_(options) {
    const Tensor gates = gates_of(cell_) > 1 ? of.p.variable_data() : Tensor();
    for (const Tensor& t : {of.h0, of.c0, of.v, of.g, of.bias, input[0], input[1], input[2],
                            input[3], of.n, gates, of.y, of.c, of.q})
      saved_.emplace_back(t, false);
    sizes_ = of.p.sizes().vec();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(6);
    if (!std::any_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); }))
      return out;
    grads.resize(3);
    const auto needs = [&](size_t i) { return task_should_compute_output(i); };
    const bool plain = std::all_of(
        grads.begin(), grads.end(), [](const Tensor& t) { return !t.defined() || is_plain(t); });
    if (!plain || at::GradMode::is_enabled()) {
      py::gil_scoped_acquire gil;
      std::vector<MaybeTensor> given, tensors;
      for (const Tensor& t : grads) given.push_back(maybe(t));
      for (size_t i = 0; i < 9; ++i) tensors.push_back(maybe(saved_[i].unpack()));
      std::vector<bool> needed;
      for (size_t i = 0; i < 6; ++i) needed.push_back(needs(i));
      return as_variables(callbacks().recurrence_grads(
          static_cast<int>(cell_), reversed_, given, tensors, options_.eps,
          as_name(options_.norm), needed));
    }
    // The bias, and what p was computed from, may have changed. To unpack a tensor may run a forward.
    const auto saved = [this](size_t i) { return saved_[i].unpack(); };
    Sequence of{
        cell_, reversed_, saved(10), saved(0), saved(1), saved(2), saved(3), saved(9), Tensor(),
        saved(11), saved(12), saved(13)};
    RECORD_FUNCTION("wn_kernels::recurrence_backward", {});
    const BelowAutograd below;
    SequenceGrads found;
    // The gates of a step are read before its gradients are written, and by no later backward.
    const bool last = !torch::autograd::get_current_graph_task_keep_graph();
    found.p = of.p.defined() && last && !saved_[10].has_hooks()
                  ? of.p
                  : at::empty(sizes_, of.v.options());
    if (!of.p.defined()) of.p = found.p;  // no gate is read
    found.q = cell_ == Cell::gru ? at::empty(sizes_, of.v.options()) : found.p;
    if (needs(1)) found.h0 = at::empty_like(of.h0);
    if (needs(2)) found.c0 = at::empty_like(of.c0);
    for (Tensor& t : grads)
      if (t.defined()) t = t.contiguous();
    with_cell(cell_, [&](auto cell) {
      AT_DISPATCH_FLOATING_TYPES(of.v.scalar_type(), "recurrence_backward", [&] {
        run_backward<decltype(cell)::value, scalar_t>(of, found, grads[0], grads[1], grads[2]);
      });
    });
    if (needs(0)) out[0] = found.p;
    out[1] = found.h0, out[2] = found.c0;
    const Tensor dq = found.q.flatten(0, 1);
    if (needs(3) || needs(4)) {
      // h before each step
      const int64_t steps = of.steps();
      const Tensor start = of.h0.unsqueeze(0);
      const Tensor before = steps == 1 ? start
          : reversed_                  ? at::cat({of.y.narrow(0, 1, steps - 1), start})
                                       : at::cat({start, of.y.narrow(0, 0, steps - 1)});
      const Tensor h = before.flatten(0, 1);
      if (!of.g.defined())
        out[3] = at::mm(dq.t(), h);
      else
        std::tie(out[3], out[4]) =
            own_ ? Linear::own_weight_grads(dq, h, of.v, of.g, of.n, options_)
                 : weight_grads(at::mm(dq.t(), h), of.v, of.g, of.n, options_, true);
    }
    if (needs(5)) out[5] = bias_grad(dq, 1);
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : saved_) each.reset_data();
  }

  std::string name() const override { return "wn_kernels::Recurrence"; }

 private:
  // h0, c0, V, g, bias, those of the input's product, n, the gates, y, c, q
  std::vector<torch::autograd::SavedVariable> saved_;
  Sizes sizes_;
  Cell cell_;
  bool reversed_, own_;
  NormOptions options_;
};

// Computes a recurrent layer in one direction. The arguments are (cell, reversed, p, h0, c0 or None, V,
// g or None, bias or None, eps, norm, (x, V, g or None, bias or None) of p). It returns (y, h_n, c_n or
// None), and overwrites p if it is recorded. It returns None, before it changes anything, for a call that
// it does not serve.
inline py::object recurrence(PyObject* const* given) {
  const auto at = [&](size_t i) { return py::handle(given[i]); };
  if (!is_eager(at::kCPU) || !PyTuple_CheckExact(given[10])) return py::none();
  bool served = true;
  const auto tensor = [&](py::handle object, bool optional = false) {
    if (object.is_none()) {
      served &= optional;
      return Tensor();
    }
    if (!is_tensor(object)) {
      served = false;
      return Tensor();
    }
    const Tensor& t = THPVariable_Unpack(object.ptr());
    served &= is_plain(t) && t.numel() > 0;
    return t;
  };
  Sequence of;
  of.cell = static_cast<Cell>(py::cast<int>(at(0)));
  of.reversed = at(1).ptr() == Py_True;
  of.p = tensor(at(2)), of.h0 = tensor(at(3)), of.c0 = tensor(at(4), true), of.v = tensor(at(5)),
  of.g = tensor(at(6), true), of.bias = tensor(at(7), true);
  InputProduct input;
  for (size_t i = 0; i < 4; ++i)
    input[i] = tensor(PyTuple_GET_ITEM(given[10], i), i > 1);
  const auto norm = norm_of(at(9));
  if (!served || !norm) return py::none();
  const int64_t gates = gates_of(of.cell), units = of.v.size(1);
  const auto dtype = of.v.scalar_type();
  for (const Tensor& t : {of.p, of.h0, of.c0, of.v, of.g, of.bias})
    served &= !t.defined() || (t.scalar_type() == dtype && t.is_contiguous());
  served &= (dtype == at::kFloat || dtype == at::kDouble) && of.p.dim() == 3 && of.v.dim() == 2 &&
            of.v.size(0) == gates * units && of.p.size(2) == gates * units &&
            (of.cell == Cell::lstm) == of.c0.defined() &&
            (!of.g.defined() || of.g.numel() == gates * units) &&
            (!of.bias.defined() || of.bias.numel() == gates * units);
  for (const Tensor& t : {of.h0, of.c0})
    served &= !t.defined() || t.sizes() == at::IntArrayRef{of.batch(), units};
  if (!served) return py::none();
  const NormOptions options{py::cast<double>(at(8)), *norm};
  bool recorded = false;
  for (const Tensor& t : {of.p, of.h0, of.c0, of.v, of.g, of.bias})
    recorded |= at::GradMode::is_enabled() && t.defined() && t.requires_grad();
  const Sizes all{of.steps(), of.batch(), units};
  of.y = at::empty(all, of.v.options());
  Planned plan;  // of the linear layer that y would go through: its backward has the same dW
  if (recorded && of.g.defined())
    plan = planned(0, {of.y, of.v, of.g, {}}, py::tuple(), py::int_(0), at(8), *norm, false);
  Tensor y, h_n, c_n;
  {
    py::gil_scoped_release released;
    const BelowAutograd below;
    if (of.g.defined()) {
      const auto n = norms(of.v, of.g, options);
      if (n) of.n = *n;
    }
    if (!of.g.defined() || of.n.defined()) {
      RECORD_FUNCTION("wn_kernels::recurrence", {});
      if (of.cell == Cell::lstm) of.c = recorded ? at::empty(all, of.v.options()) : of.c0.clone();
      if (of.cell == Cell::gru && recorded) of.q = at::empty(all, of.v.options());
      with_cell(of.cell, [&](auto cell) {
        AT_DISPATCH_FLOATING_TYPES(dtype, "recurrence", [&] {
          run_forward<decltype(cell)::value, scalar_t>(of, recorded);
        });
      });
      const int64_t last = of.reversed ? 0 : of.steps() - 1;
      h_n = of.y.select(0, last).clone();
      if (of.c.defined()) c_n = recorded ? of.c.select(0, last).clone() : of.c;
      y = recorded ? of.y.clone() : of.y;  // which others may write into
    } else {
      served = false;
    }
  }
  if (!served) return py::none();
  if (recorded) {
    variable_list outputs{y, h_n};
    if (c_n.defined()) outputs.push_back(c_n);
    Recurrence::record(
        of, input, options, plan && plan->backward == Variant::own, outputs);
  }
  return py::make_tuple(y, h_n, c_n.defined() ? py::cast(c_n) : py::none());
}

}  // namespace wn_kernels
