// A convolution over few pixels is computed as a product of V with the unfolded image U. It reads
// the weight once, or once for each thread if they share the columns of U.
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

  // Returns (begin, end) of the i from 0 to `count` for which 0 <= first + i step < size.
  static std::pair<int64_t, int64_t> within(
      int64_t first, int64_t step, int64_t count, int64_t size) {
    const int64_t rest = size - first;
    const int64_t end = rest > 0 ? std::min(count, (rest + step - 1) / step) : 0;
    return {std::min(end, first < 0 ? (step - 1 - first) / step : 0), end};
  }

  const int64_t groups, rows, channels, batch;
  const Triple sizes, pixels, taps, stride, padding, dilation;
};

// --- along lines of pixels -----------------------------------------------------------------------

// U is computed in windows of so many columns. A window of as many rows as a vector has lanes is copied
// from the image row by row, and then turned into a panel in squares. Its inverse adds it to the image.
constexpr int64_t kWindow = 128;
template <typename T>
struct Window {
  static constexpr int64_t lanes = Lanes<T>::count;
  alignas(kVectorBytes) T row[lanes][kWindow];

  // Copies `count` rows and `columns` columns to U, whose rows from k on and columns from `left` on they are.
  void store_to(Panels<T>& u, int64_t k, int64_t, int64_t left, int64_t columns) const {
    T* const to = u.element(k, left);
    for (int64_t j = 0; j < columns; j += lanes) {
      Vector<T> t[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) t[r] = load(row[r] + j);
      transpose<T>(t);
#pragma GCC unroll 16
      for (int64_t k = 0; k < lanes; ++k)
        if (j + k < columns) store(to + (j + k) * kPanel<T>, t[k]);
    }
  }
  void store_to(Strips<T>& u, int64_t k, int64_t count, int64_t left, int64_t columns) const {
    for (int64_t r = 0; r < count; ++r) u.set(k + r, left, columns, row[r]);
  }
  void load_from(const T* from, int64_t columns) {
    for (int64_t j = 0; j < columns; j += lanes) {
      Vector<T> t[lanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < lanes; ++k)
        t[k] = j + k < columns ? load(from + (j + k) * kPanel<T>) : Vector<T>{};
      transpose<T>(t);
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) store(row[r] + j, t[r]);
    }
  }
};

// Says where the windows of `columns` columns of U lie in the image, from column `first` on.
class Windows {
 public:
  Windows(const Unfolding& of, int64_t first, int64_t columns)
      : of_(of), columns_(columns), parts_((columns + kWindow - 1) / kWindow) {
    int64_t column = -first;  // from the first one on
    for (int64_t n = 0; n < of.batch; ++n)
      for (int64_t z = 0; z < of.pixels[0]; ++z)
        for (int64_t y = 0; y < of.pixels[1]; ++y)
          for (int64_t x = 0, count; x < of.pixels[2]; x += count, column += count) {
            count = of.pixels[2] - x;
            if (column < 0) {
              count = std::min(count, -column);
            } else if (column < columns) {
              count = std::min({count, columns - column, kWindow - column % kWindow});
              parts_[column / kWindow].push_back(
                  {n * of.image(), z * of.stride[0], y * of.stride[1], x, x + count, column % kWindow});
            }
          }
    for (int64_t tap = 0; tap < of.taps[2]; ++tap)
      ends_.push_back(
          of.within(tap * of.dilation[2] - of.padding[2], of.stride[2], of.pixels[2], of.sizes[2]));
  }

  int64_t count() const { return parts_.size(); }
  int64_t columns(int64_t window) const {
    return std::min(kWindow, columns_ - window * kWindow);
  }

  // A row of U is a position of the kernel in a channel. Pixels from begin to end of each line are in the
  // image, and others are padding.
  struct Row {
    int64_t channel, plane, line, tap, begin, end;
  };
  // Calls f(r, row) for `count` rows from row k on.
  template <typename F>
  void for_each_row(int64_t k, int64_t count, const F& f) const {
    int64_t channel = k / product(of_.taps), c = k % of_.taps[2], b = k / of_.taps[2] % of_.taps[1],
            a = k / (of_.taps[1] * of_.taps[2]) % of_.taps[0];
    for (int64_t r = 0; r < count; ++r) {
      f(r, Row{channel, a * of_.dilation[0] - of_.padding[0], b * of_.dilation[1] - of_.padding[1], c,
               ends_[c].first, ends_[c].second});
      if (++c == of_.taps[2] && (c = 0, ++b == of_.taps[1]) && (b = 0, ++a == of_.taps[0]))
        a = 0, ++channel;
    }
  }

  // Calls f(column, at, count) for each run of a row in a window, which starts at this column of the window
  // and at element `at` of the image.
  template <typename F>
  void for_each_run(int64_t window, const Row& row, const F& f) const {
    for (const Part& part : parts_[window]) {
      const int64_t plane = part.plane + row.plane, line = part.line + row.line,
                    begin = std::max(part.begin, row.begin), end = std::min(part.end, row.end);
      if (plane < 0 || plane >= of_.sizes[0] || line < 0 || line >= of_.sizes[1] || begin >= end)
        continue;
      const int64_t start = ((row.channel * of_.sizes[0] + plane) * of_.sizes[1] + line) * of_.sizes[2],
                    first = begin * of_.stride[2] + row.tap * of_.dilation[2] - of_.padding[2];
      f(part.column + begin - part.begin, part.sample + start + first, end - begin);
    }
  }

 private:
  // A part of a line of pixels, from `begin` to `end`: where its sample starts, and the plane and the line
  // of the image where the kernel's first position lies, without padding.
  struct Part {
    int64_t sample, plane, line, begin, end, column;
  };

  const Unfolding& of_;
  const int64_t columns_;
  std::vector<std::vector<Part>> parts_;  // of each window
  std::vector<std::pair<int64_t, int64_t>> ends_;  // of the pixels in the image, for each tap of a line
};

// Computes columns of U from the image of a group, window by window: those from `first` on.
template <typename T, typename Matrix>
void unfold_lines(const Unfolding& of, const T* image, const T* s, Matrix& u, int64_t first) {
  constexpr int64_t lanes = Lanes<T>::count;
  const Windows windows(of, first, u.columns);
  const int64_t step = of.stride[2];
  u.zero_rest();
  // Panels have an even number of vectors of rows.
  const int64_t panels = (u.length + kPanel<T> - 1) / kPanel<T>;
  for_each(2 * panels, lanes * u.columns, [&](int64_t i) {
    const int64_t rows = std::clamp<int64_t>(u.length - i * lanes, 0, lanes);
    Window<T> window;
    for (int64_t w = 0; w < windows.count(); ++w) {
      const int64_t columns = windows.columns(w);
      for (auto& row : window.row)
        for_each_vector<T>(columns, [&](int64_t j, auto) { store(row + j, Vector<T>{}); });
      windows.for_each_row(i * lanes, rows, [&](int64_t r, const Windows::Row& row) {
        const T factor = s ? s[row.tap] : T(1);
        windows.for_each_run(w, row, [&](int64_t column, int64_t at, int64_t count) {
          T* to = window.row[r] + column;
          const T* from = image + at;
          if (step > 1)
            for (int64_t j = 0; j < count; ++j) to[j] = factor * from[j * step];
          else
            scale(to, from, factor, count);
        });
      });
      window.store_to(u, i * lanes, rows, w * kWindow, columns);
    }
  });
}

// Adds Q to the image of a group, window by window. The elements of an image are added to in one order,
// whichever thread does it.
template <typename T>
void fold_lines(const Unfolding& of, const Panels<T>& q, const T* s, T* image) {
  constexpr int64_t lanes = Lanes<T>::count;
  const Windows windows(of, 0, q.columns);
  const int64_t taps = product(of.taps), step = of.stride[2];
  at::parallel_for(0, of.channels, grain(taps * q.columns), [&](int64_t begin, int64_t end) {
    // A vector of rows may have channels of two threads. Each thread adds its own ones.
    for (int64_t k = begin * taps / lanes * lanes; k < end * taps; k += lanes) {
      Window<T> window;
      for (int64_t w = 0; w < windows.count(); ++w) {
        window.load_from(q.element(k, w * kWindow), windows.columns(w));
        windows.for_each_row(k, lanes, [&](int64_t r, const Windows::Row& row) {
          if (row.channel < begin || row.channel >= end) return;
          const T factor = s ? s[row.tap] : T(1);
          windows.for_each_run(w, row, [&](int64_t column, int64_t at, int64_t count) {
            const T* from = window.row[r] + column;
            T* to = image + at;
            if (step > 1 || count < lanes)
              for (int64_t j = 0; j < count; ++j) to[j * step] += factor * from[j];
            else
              for_each_vector<T>(count, [=](int64_t j, auto part) {
                store(to + j, load(to + j, part) + factor * load(from + j, part), part);
              });
          });
        });
      }
    }
  });
}

// --- along lines of the kernel -------------------------------------------------------------------

// Returns whether lines of the kernel are copied, and not lines of pixels. The pixels of a long line of the
// kernel are neighbours, and so are those of lines of pixels without a stride.
template <typename T>
bool is_along_taps(const Unfolding& of) {
  return of.taps[2] >= kLongLine && (of.stride[2] > 1 || of.pixels[2] < Lanes<T>::count);
}

// Calls f(to, at, tap, count) for every run of a channel's elements along a line of the kernel, within a
// panel of U. It starts at this element of U, at element `at` of the image, and at this tap of the line.
template <typename T, typename Matrix, typename F>
void for_each_run_of_taps(const Unfolding& of, int64_t channel, Matrix& u, const F& f) {
  const int64_t step = of.dilation[2];
  int64_t k = channel * product(of.taps);
  for (int64_t a = 0; a < of.taps[0]; ++a)
    for (int64_t b = 0; b < of.taps[1]; ++b, k += of.taps[2]) {
      int64_t column = 0;
      for (int64_t n = 0; n < of.batch; ++n)
        for (int64_t z = 0; z < of.pixels[0]; ++z)
          for (int64_t y = 0; y < of.pixels[1]; ++y, column += of.pixels[2]) {
            const int64_t plane = z * of.stride[0] - of.padding[0] + a * of.dilation[0],
                          line = y * of.stride[1] - of.padding[1] + b * of.dilation[1];
            if (plane < 0 || plane >= of.sizes[0] || line < 0 || line >= of.sizes[1]) continue;
            const int64_t start =
                n * of.image() + ((channel * of.sizes[0] + plane) * of.sizes[1] + line) * of.sizes[2];
            for (int64_t x = 0; x < of.pixels[2]; ++x) {
              const int64_t first = x * of.stride[2] - of.padding[2];
              auto [c, end] = of.within(first, step, of.taps[2], of.sizes[2]);
              while (c < end) {
                const int64_t count = std::min(end - c, kPanel<T> - (k + c) % kPanel<T>);
                f(u.element(k + c, column + x), start + first + c * step, c, count);
                c += count;
              }
            }
          }
    }
}

// --- U and its adjoint ---------------------------------------------------------------------------

// Computes columns of U from the image of a group, from `first` on. If s is given, each element is
// multiplied by its tap's s. Lines of the kernel are copied for all columns at once.
template <typename T>
void unfold(const Unfolding& of, const T* image, const T* s, Panels<T>& u, int64_t first = 0) {
  if (!is_along_taps<T>(of)) return unfold_lines(of, image, s, u, first);
  of.pads() ? u.zero() : u.zero_rest();
  const int64_t step = of.dilation[2];
  for_each(of.channels, u.length / of.channels * u.columns, [&](int64_t channel) {
    for_each_run_of_taps<T>(of, channel, u, [&](T* to, int64_t at, int64_t tap, int64_t count) {
      const T* from = image + at;
      if (s)
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * step] * s[tap + i];
      else
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
    });
  });
}

template <typename T>
void unfold(const Unfolding& of, const T* image, const T* s, Strips<T>& u, int64_t first = 0) {
  if (!is_along_taps<T>(of)) return unfold_lines(of, image, s, u, first);
  Panels<T> panels(u.length, u.columns);
  unfold(of, image, s, panels, first);
  u.fill(panels);
}

// Computes the image of a group. It starts from the channel's bias and adds every element of Q to
// the place that the element came from. If s is given, each element is multiplied by its tap's s.
template <typename T>
void fold(const Unfolding& of, const Panels<T>& q, const T* s, const T* bias, T* image) {
  const int64_t size = product(of.sizes), step = of.dilation[2];
  for_each(of.channels, q.length / of.channels * q.columns, [&](int64_t channel) {
    for (int64_t n = 0; n < of.batch; ++n)
      std::fill_n(image + n * of.image() + channel * size, size, bias ? bias[channel] : T(0));
    if (!is_along_taps<T>(of)) return;
    for_each_run_of_taps<T>(of, channel, q, [&](const T* from, int64_t at, int64_t tap, int64_t count) {
      T* to = image + at;
      if (s)
        for (int64_t i = 0; i < count; ++i) to[i * step] += from[i] * s[tap + i];
      else
        for (int64_t i = 0; i < count; ++i) to[i * step] += from[i];
    });
  });
  if (!is_along_taps<T>(of)) fold_lines(of, q, s, image);
}

// Threads share the columns of U if each has at least so many, V has at most so many bytes, and there is
// one group, of which lines of pixels are copied. Each of them unfolds what it multiplies, so that no thread
// waits for what another has written, and reads all of V.
constexpr int64_t kColumnsOfThread = 128;
constexpr int64_t kWeightOfThread = 1 << 22;

template <typename T>
bool shares_columns(const Unfolding& of) {
  return of.groups == 1 && of.columns() >= at::get_num_threads() * kColumnsOfThread &&
         !is_along_taps<T>(of) &&
         of.rows * of.length() * static_cast<int64_t>(sizeof(T)) <= kWeightOfThread;
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
    Turned<T> scaled(count, q.columns);
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
      scaled.set(r, x + row * q.columns, q.columns, s);
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
    const bool is_shared = shares_columns<T>(of);
    const int64_t parts = is_shared ? at::get_num_threads() : 1;
    for_each_group(of, [&](int64_t i) {
      const int64_t row = i * rows;
      const T *from = vs + row * length, *image = xs + of.begins(i);
      for_each_part<T>(pixels, parts, is_shared, [&](int64_t part, int64_t left, int64_t columns) {
        Strips<T> strips(length, columns);
        unfold(of, image, taps, strips, left);
        // Every part computes the norms, and the first one keeps them.
        std::vector<T> again(part ? rows : 0);
        Norms<T> passing(again.data(), options), &norms = part ? passing : all;
        for_each_stack<T>(rows, length * columns, [&](int64_t first, int64_t count) {
          const auto finish = [&](const T* p, const double* partials) {
            for (int64_t j = first; j < first + count; ++j, p += strips.sums()) {
              const T* slice = from + j * length;
              const T factor =
                  scales_taps ? T(1) : gs[row + j] / norms.set(row + j, partials[j - first], slice, length);
              const T shift = bs ? bs[row + j] : T(0);
              T* to = ys + (row + j) * pixels + left;
              for (int64_t t = 0; t < columns; ++t) to[t] = p[t] * factor + shift;
            }
          };
          rows_product(from, first, count, strips, norm, finish);
        });
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
      const auto x_rows = [&](const Strips<T>& strips, int64_t first, int64_t count) {
        rows_product(from, first, count, strips, std::nullopt, [&](const T* p, const double*) {
          for (int64_t j = row + first; j < row + first + count; ++j, p += strips.sums())
            scale(outs + j * pixels, p, scales_taps ? T(1) : ss[j], pixels);
        });
      };
      const auto v_rows = [&](int64_t first, int64_t count) {
        const auto d = by_rows(factors, pixels);
        if (scales_taps)
          outer_product(dvs, d, row + first, count, panels);
        else
          weight_rows(dvs, dgs, d, vs, gs, ns, options, row + first, count, panels);
      };
      const bool with_x = needs_x && conv.transposed;
      if (needs_weight) unfold<T>(of, images + at, nullptr, panels);
      if (with_x) {
        Strips<T> strips(length, pixels);
        const bool at_once = needs_weight && !scales_taps;  // both take the same U, so V is read once
        if (at_once)
          strips.fill(panels);
        else
          unfold(of, images + at, taps, strips);
        for_each_stack<T>(rows, length * pixels, [&](int64_t first, int64_t count) {
          x_rows(strips, first, count);
          if (at_once) v_rows(first, count);
        });
        if (at_once) return;
      }
      if (needs_weight) for_each_stack<T>(rows, length * pixels, v_rows);
    });
    if (needs_x) dx = conv.transposed ? from_matrix(out, x.sizes()) : out;
  });
  if (needs_weight && scales_taps) std::tie(dv, dg) = weight_grads(dv, v, g, n, options, true);
  return {dx, dv, dg};
}

}  // namespace wn_kernels
