// A convolution over few pixels is computed as a product of V with the unfolded image U. It reads
// the weight once.
//
//   U[(channel, tap), (batch, pixel)] = image[batch, channel, pixel stride - padding + tap dilation]
//
//   convolution    y = W U(x)         dX = fold(Wᵀ dY)    dW = dY U(x)ᵀ
//   transposed     y = fold(Wᵀ x)     dX = W U(dY)        dW = x U(dY)ᵀ
//
// `fold` adds each element to the element of the image that it came from. y and dY of a
// convolution, and x and dX of a transposed one, are matrices (channels, batch pixels). A scale of
// rows multiplies the rows of V. A scale of taps multiplies U.

#pragma once

#include <array>
#include <utility>

#include "products.h"
#include "weight.h"

namespace wn_kernels {

// Holds three spatial dimensions. Missing leading ones are filled in; their size is 1.
using Triple = std::array<int64_t, 3>;

inline Triple triple(at::IntArrayRef sizes, int64_t fill) {
  Triple out{fill, fill, fill};
  std::copy(sizes.begin(), sizes.end(), out.end() - sizes.size());
  return out;
}

inline int64_t product(const Triple& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Returns whether a tensor's channels come first in memory. Only such tensors are unfolded, because
// for other layouts PyTorch's output has that layout too.
inline bool is_channels_first(const Tensor& t) {
  return t.is_contiguous() && t.suggest_memory_format() == at::MemoryFormat::Contiguous;
}

// Describes one group of a convolution. Its `channels` of the image are paired with `rows` of V.
struct Unfolding {
  Unfolding(const Geometry& conv, const Tensor& v, at::IntArrayRef x, at::IntArrayRef y)
      : groups(conv.groups), rows(v.size(0) / groups), channels(v.size(1)), batch(x[0]),
        sizes(triple((conv.transposed ? y : x).slice(2), 1)),
        pixels(triple((conv.transposed ? x : y).slice(2), 1)), taps(triple(v.sizes().slice(2), 1)),
        stride(triple(conv.stride, 1)), padding(triple(conv.padding, 0)),
        dilation(triple(conv.dilation, 1)) {}

  int64_t length() const { return channels * product(taps); }
  int64_t columns() const { return batch * product(pixels); }
  int64_t image() const { return groups * channels * product(sizes); }  // elements per sample

  int64_t begins(int64_t group) const { return group * channels * product(sizes); }  // in a sample

  bool pads() const { return padding != Triple{}; }

  // Calls f(k, column, at, tap, count, along_taps) for every run of a channel's elements. A run
  // starts at element k of this column of U and at element `at` of the image, and `tap` is its
  // position in the line of the kernel. It has `count` elements. If the kernel's lines are long, a
  // run follows a line of the kernel within a panel of `width` elements. Otherwise it follows a
  // line of pixels.
  template <int64_t width, typename F>
  void for_each_run(int64_t channel, const F& f) const {
    int64_t k = channel * product(taps);
    for (int64_t a = 0; a < taps[0]; ++a)
      for (int64_t b = 0; b < taps[1]; ++b, k += taps[2]) {
        int64_t column = 0;
        for (int64_t n = 0; n < batch; ++n)
          for (int64_t z = 0; z < pixels[0]; ++z)
            for (int64_t y = 0; y < pixels[1]; ++y, column += pixels[2]) {
              const int64_t plane = z * stride[0] - padding[0] + a * dilation[0],
                            line = y * stride[1] - padding[1] + b * dilation[1];
              if (plane < 0 || plane >= sizes[0] || line < 0 || line >= sizes[1]) continue;
              const int64_t start = ((channel * sizes[0] + plane) * sizes[1] + line) * sizes[2];
              for_each_run_of_a_line<width>(k, column, n * image() + start, f);
            }
      }
  }

  const int64_t groups, rows, channels, batch;
  const Triple sizes, pixels, taps, stride, padding, dilation;

 private:
  // Returns (begin, end) of the i from 0 to `count` for which 0 <= first + i step < size.
  static std::pair<int64_t, int64_t> within(
      int64_t first, int64_t step, int64_t count, int64_t size) {
    const int64_t rest = size - first;
    const int64_t end = rest > 0 ? std::min(count, (rest + step - 1) / step) : 0;
    return {std::min(end, first < 0 ? (step - 1 - first) / step : 0), end};
  }

  template <int64_t width, typename F>
  void for_each_run_of_a_line(int64_t k, int64_t column, int64_t start, const F& f) const {
    const int64_t step = dilation[2], pixel = stride[2];
    if (taps[2] < kLongLine) {
      for (int64_t c = 0; c < taps[2]; ++c) {
        const int64_t first = c * step - padding[2];
        const auto [begin, end] = within(first, pixel, pixels[2], sizes[2]);
        f(k + c, column + begin, start + first + begin * pixel, c, end - begin, false);
      }
      return;
    }
    for (int64_t x = 0; x < pixels[2]; ++x) {
      const int64_t first = x * pixel - padding[2];
      auto [c, end] = within(first, step, taps[2], sizes[2]);
      while (c < end) {
        const int64_t count = std::min(end - c, width - (k + c) % width);
        f(k + c, column + x, start + first + c * step, c, count, true);
        c += count;
      }
    }
  }
};

// Computes U from the image of a group. If s is given, each element is multiplied by its tap's s.
template <typename T>
void unfold(const Unfolding& of, const T* image, const T* s, Panels<T>& u) {
  constexpr int64_t width = kPanel<T>;
  of.pads() ? u.zero() : u.zero_rest();
  for_each(of.channels, u.length / of.channels * u.columns, [&](int64_t channel) {
    of.for_each_run<width>(
        channel,
        [&](int64_t k, int64_t column, int64_t at, int64_t tap, int64_t count, bool along_taps) {
          T* to = u.element(k, column);
          const T* from = image + at;
          const int64_t step = along_taps ? of.dilation[2] : of.stride[2];
          if (!along_taps)
            for (int64_t i = 0; i < count; ++i) to[i * width] = from[i * step] * (s ? s[tap] : 1);
          else if (s)
            for (int64_t i = 0; i < count; ++i) to[i] = from[i * step] * s[tap + i];
          else
            for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
        });
  });
}

// Computes the image of a group. It starts from the channel's bias and adds every element of Q to
// the place that the element came from. If s is given, each element is multiplied by its tap's s.
template <typename T>
void fold(const Unfolding& of, const Panels<T>& q, const T* s, const T* bias, T* image) {
  constexpr int64_t width = kPanel<T>;
  const int64_t size = product(of.sizes);
  for_each(of.channels, q.length / of.channels * q.columns, [&](int64_t channel) {
    for (int64_t n = 0; n < of.batch; ++n)
      std::fill_n(image + n * of.image() + channel * size, size, bias ? bias[channel] : T(0));
    of.for_each_run<width>(
        channel,
        [&](int64_t k, int64_t column, int64_t at, int64_t tap, int64_t count, bool along_taps) {
          const T* from = q.element(k, column);
          T* to = image + at;
          const int64_t step = along_taps ? of.dilation[2] : of.stride[2];
          if (!along_taps)
            for (int64_t i = 0; i < count; ++i) to[i * step] += from[i * width] * (s ? s[tap] : 1);
          else if (s)
            for (int64_t i = 0; i < count; ++i) to[i * step] += from[i] * s[tap + i];
          else
            for (int64_t i = 0; i < count; ++i) to[i * step] += from[i];
        });
  });
}

// Calls f(i) for every group. If there are enough groups, each gets one thread, so that no thread
// reads what another has just written. Otherwise all threads share one group after the other.
template <typename F>
void for_each_group(const Unfolding& of, const F& f) {
  const int64_t threads = at::get_num_threads();
  if (of.groups % threads == 0 || of.groups >= 4 * threads)
    for_each(of.groups, of.rows * of.length() * of.columns(), f);
  else
    for (int64_t i = 0; i < of.groups; ++i) f(i);
}

// `as_matrix` turns (batch, channels, *) into a matrix (channels, batch pixels). `from_matrix` is
// its inverse.
inline Tensor as_matrix(const Tensor& t) {
  return t.transpose(0, 1).reshape({t.size(1), -1}).contiguous();
}
inline Tensor from_matrix(const Tensor& matrix, at::IntArrayRef sizes) {
  auto swapped = sizes.vec();
  std::swap(swapped[0], swapped[1]);
  return matrix.view(swapped).transpose(0, 1).contiguous();
}

// --- forward -------------------------------------------------------------------------------------

// This many bytes of V stay in each thread's cache between its norms and its product.
constexpr int64_t kChunkBytes = 1 << 20;

// Computes Q = Vᵀ S X for the rows of a group, and the norms of these rows.
template <typename T>
void normalised_columns_product(
    Panels<T>& q, const T* v, const T* g, int64_t first_row, int64_t rows, const T* x,
    Norm norm, Norms<T>& norms) {
  const int64_t group = panel_group(q.count), groups = (q.count + group - 1) / group;
  const int64_t length = q.length;
  const int64_t cached = kChunkBytes * at::get_num_threads() / (length * sizeof(T));
  const int64_t chunk = std::min(rows, std::max<int64_t>(1, cached / kStackedRows) * kStackedRows);
  std::vector<double> partials(groups * chunk);
  q.zero();
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const T* from = v + first * length;
    Stacked<T, kStackedRows> scaled(count, q.columns);
    // The thread that computes the partials of some columns has them in its cache for the product.
    for_each_panel_group(q, count, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * kPanel<T>, width = std::min(end * kPanel<T>, length) - at;
      for (int64_t r = 0; r < count; ++r)
        partials[begin / group * chunk + r] = partial(norm, from + r * length + at, width);
    });
    for (int64_t r = 0; r < count; ++r) {
      double all = 0;
      for (int64_t i = 0; i < groups; ++i) all = merged(norm, all, partials[i * chunk + r]);
      const int64_t row = first + r;
      const T s = g[row] / norms.set(first_row + row, all, from + r * length, length);
      scaled.set(r, x + row * q.columns, s);
    }
    for_each_panel_group(q, count * q.columns, [&](int64_t begin, int64_t end) {
      columns_product(q, begin, end, from, count, scaled);
    });
  }
}

// Returns y and n, or nothing if a norm is out of range.
inline std::optional<std::pair<Tensor, Tensor>> unfolded_forward(
    const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias, const Geometry& conv,
    at::IntArrayRef y_sizes, const NormOptions& options) {
  const bool scales_taps = Extents(v, g).columns;
  const Unfolding of(conv, v, x.sizes(), y_sizes);
  Tensor n = empty_as(g), y, s;
  if (scales_taps) {
    const auto found = norms(v, g, options);
    if (!found) return std::nullopt;
    n = *found, s = g / n;
  }
  bool in_range = true;
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "unfolded_forward", [&] {
    using T = scalar_t;
    const auto *vs = v.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
               *bs = bias.defined() ? bias.const_data_ptr<T>() : nullptr,
               *taps = scales_taps ? s.const_data_ptr<T>() : nullptr;
    Norms<T> all(n.mutable_data_ptr<T>(), options);
    const int64_t pixels = of.columns(), rows = of.rows, length = of.length();
    if (conv.transposed) {
      y = at::empty(y_sizes, x.options());
      const Tensor input = as_matrix(x);
      const auto* xs = input.const_data_ptr<T>();
      auto* ys = y.mutable_data_ptr<T>();
      for_each_group(of, [&](int64_t i) {
        Panels<T> panels(length, pixels);
        const int64_t row = i * rows;
        const T *from = vs + row * length, *factors = xs + row * pixels;
        if (scales_taps) {
          columns_product(panels, from, rows, by_rows(factors, pixels));
        } else {
          normalised_columns_product(
              panels, from, gs + row, row, rows, factors, options.norm, all);
        }
        fold(of, panels, taps, bs ? bs + i * of.channels : nullptr, ys + of.begins(i));
      });
      in_range = all.in_range();
      return;
    }
    const auto norm = scales_taps ? std::nullopt : std::make_optional(options.norm);
    const Tensor matrix = at::empty({v.size(0), pixels}, x.options());
    const auto* xs = x.const_data_ptr<T>();
    auto* ys = matrix.mutable_data_ptr<T>();
    for_each_group(of, [&](int64_t i) {
      Panels<T> panels(length, pixels);
      const int64_t row = i * rows;
      const T* from = vs + row * length;
      unfold(of, xs + of.begins(i), taps, panels);
      for_each_stack(rows, panels, [&](int64_t first, int64_t count) {
        const auto finish = [&](int64_t j, const T* p, double partial) {
          const T factor =
              scales_taps ? T(1) : gs[row + j] / all.set(row + j, partial, from + j * length, length);
          const T shift = bs ? bs[row + j] : T(0);
          T* to = ys + (row + j) * pixels;
          for (int64_t t = 0; t < pixels; ++t) to[t] = p[t] * factor + shift;
        };
        each_row_product(from, first, count, panels, norm, finish);
      });
    });
    in_range = all.in_range();
    y = from_matrix(matrix, y_sizes);
  });
  return in_range ? std::make_optional(std::make_pair(y, n)) : std::nullopt;
}

// --- backward ------------------------------------------------------------------------------------

// Returns (dX, dV, dg). A gradient that is not needed is undefined.
inline std::tuple<Tensor, Tensor, Tensor> unfolded_backward(
    const Tensor& grad, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
    const Geometry& conv, const NormOptions& options, bool needs_x, bool needs_weight) {
  const bool scales_taps = Extents(v, g).columns;
  const Unfolding of(conv, v, x.sizes(), grad.sizes());
  const Tensor dy = grad.contiguous(), s = g / n;
  // Both products take the matrix (rows, columns), and the image. If the convolution is transposed,
  // they are x and dY; otherwise they are dY and x.
  const Tensor matrix = as_matrix(conv.transposed ? x : dy);
  const Tensor& image = conv.transposed ? dy : x;
  Tensor dx, dv, dg;
  if (needs_weight) dv = empty_as(v), dg = empty_as(g);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "unfolded_backward", [&] {
    using T = scalar_t;
    const auto *vs = v.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
               *ns = n.const_data_ptr<T>(), *ss = s.const_data_ptr<T>(),
               *factors = matrix.const_data_ptr<T>(), *images = image.const_data_ptr<T>();
    const T* taps = scales_taps ? ss : nullptr;
    auto *dvs = needs_weight ? dv.mutable_data_ptr<T>() : nullptr,
         *dgs = needs_weight ? dg.mutable_data_ptr<T>() : nullptr;
    const int64_t pixels = of.columns(), rows = of.rows, length = of.length();
    Tensor out;
    if (needs_x) out = conv.transposed ? at::empty_like(matrix) : at::empty_like(x);
    T* outs = needs_x ? out.mutable_data_ptr<T>() : nullptr;
    const Tensor scaled =
        needs_x && !conv.transposed && !scales_taps ? matrix * s.view({-1, 1}) : matrix;
    for_each_group(of, [&](int64_t i) {
      Panels<T> panels(length, pixels);
      const int64_t row = i * rows, at = of.begins(i);
      const T* from = vs + row * length;
      if (needs_x && !conv.transposed) {
        const auto* d = scaled.const_data_ptr<T>() + row * pixels;
        columns_product(panels, from, rows, by_rows(d, pixels));
        fold<T>(of, panels, taps, nullptr, outs + at);
      }
      const auto x_rows = [&](int64_t first, int64_t count) {
        const auto finish = [&](int64_t j, const T* p, double) {
          scale(outs + (row + j) * pixels, p, scales_taps ? T(1) : ss[row + j], pixels);
        };
        each_row_product(from, first, count, panels, std::nullopt, finish);
      };
      const auto v_rows = [&](int64_t first, int64_t count) {
        const auto d = by_rows(factors, pixels);
        if (scales_taps)
          outer_product(dvs, d, row + first, count, panels);
        else
          weight_rows(dvs, dgs, d, vs, gs, ns, options, row + first, count, panels);
      };
      const bool with_x = needs_x && conv.transposed;
      if (with_x && needs_weight && !scales_taps) {  // both take the same U, so V is read once
        unfold<T>(of, images + at, nullptr, panels);
        for_each_stack(rows, panels, [&](int64_t first, int64_t count) {
          x_rows(first, count);
          v_rows(first, count);
        });
        return;
      }
      if (with_x) {
        unfold(of, images + at, taps, panels);
        for_each_stack(rows, panels, x_rows);
      }
      if (needs_weight) {
        unfold<T>(of, images + at, nullptr, panels);
        for_each_stack(rows, panels, v_rows);
      }
    });
    if (needs_x) dx = conv.transposed ? from_matrix(out, x.sizes()) : out;
  });
  if (needs_weight && scales_taps) std::tie(dv, dg) = weight_grads(dv, v, g, n, options, true);
  return {dx, dv, dg};
}

}  // namespace wn_kernels
