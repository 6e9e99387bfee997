// This file allocates memory for weights that are formed.
//
// The C library returns memory to the system when enough of it is free at the end of the heap. The
// next call then has a page fault for every 4 KiB that it allocates, which takes longer than to form
// them. The memory of a W that is formed again and again is therefore kept.

#pragma once

#include <atomic>
#include <vector>

#include <ATen/EmptyTensor.h>

#include "call.h"

namespace wn_kernels {

// Returns memory for numbers of this dtype, laid out as those of a dense tensor. No dispatcher runs.
inline Tensor empty_as(const Tensor& t, at::ScalarType dtype) {
  return Tensor(at::detail::empty_strided_cpu(t.sizes(), t.strides(), dtype));
}

inline Tensor empty_as(const Tensor& t) { return empty_as(t, t.scalar_type()); }

inline Tensor empty_bytes(int64_t bytes) {
  return Tensor(at::detail::empty_cpu({bytes}, at::kByte));
}

inline int64_t bytes_of(const Tensor& t, at::ScalarType dtype) {
  return t.numel() * static_cast<int64_t>(c10::elementSize(dtype));
}

// Returns a tensor of this dtype, laid out as `t`, that begins at a byte of a block. It shares the
// memory of the block, and is no view of it.
inline Tensor placed(
    const Tensor& block, const Tensor& t, at::ScalarType dtype, int64_t begin = 0) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(block.storage()), c10::DispatchKeySet(block.options().computeDispatchKey()),
      c10::scalarTypeToTypeMeta(dtype));
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(begin / static_cast<int64_t>(c10::elementSize(dtype)));
  impl->set_sizes_and_strides(t.sizes(), t.strides());
  return out;
}

// Returns whether the holder of a tensor may write into it.
inline bool is_free(const Tensor& t) {
  return t.use_count() == 1 && t.storage().use_count() == 1;
}

// A W of at most this many bytes may have memory that is kept for the next one.
constexpr int64_t kPassingBytes = 1 << 21;

// Returns memory for a W in this dtype that its caller alone uses, and only until it returns. A small
// one has the same memory in every call of a thread. Otherwise W would leave a hole in the heap, which
// small tensors then break up.
inline Tensor passing_weight(const Tensor& v, at::ScalarType dtype) {
  static thread_local Tensor memory;
  const int64_t bytes = bytes_of(v, dtype);
  if (bytes > kPassingBytes) return empty_as(v, dtype);
  if (!memory.defined() || memory.numel() < bytes || !is_free(memory)) memory = empty_bytes(bytes);
  return placed(memory, v, dtype);
}

// A lasting W of fewer bytes has memory of its own, which comes from the heap.
constexpr int64_t kLeastBytes = 1 << 16;
// A thread keeps at most this many bytes for lasting weights.
constexpr int64_t kMostBytes = 1 << 27;

// Returns memory for a W in this dtype that lasts until a forward or its backward is over. The thread
// keeps it, and gives it to another W as soon as nothing refers to it.
inline Tensor lasting_weight(const Tensor& v, at::ScalarType dtype) {
  static thread_local std::vector<Tensor> kept;
  const int64_t bytes = bytes_of(v, dtype);
  if (bytes < kLeastBytes) return empty_as(v, dtype);
  // A block of another size would keep more memory than W for the backward.
  const Tensor* found = nullptr;
  int64_t all = bytes;
  for (const Tensor& block : kept) {
    all += block.numel();
    if (block.numel() == bytes && is_free(block)) found = &block;
  }
  if (!found) {
    // Those that fit no W of late make room.
    for (auto block = kept.begin(); all > kMostBytes && block != kept.end();) {
      if (is_free(*block)) {
        all -= block->numel();
        block = kept.erase(block);
      } else {
        ++block;
      }
    }
    if (all > kMostBytes) return empty_as(v, dtype);
    found = &kept.emplace_back(empty_bytes(bytes));
  }
  // What other threads did with the block has happened before.
  std::atomic_thread_fence(std::memory_order_acquire);
  return placed(*found, v, dtype);
}

}  // namespace wn_kernels
