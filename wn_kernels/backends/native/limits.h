// The thresholds that the cost model computes with as well: limits.py states them, and the build
// defines them here.

#pragma once

#include <cstdint>
#include <type_traits>

#ifndef WN_LEFT_ROWS
#error "python -m wn_kernels build defines the thresholds of limits.py"
#endif

namespace wn_kernels {

constexpr int64_t kLeftRows = WN_LEFT_ROWS;
constexpr int64_t kLeftRowsAlone = WN_LEFT_ROWS_ALONE;
constexpr int64_t kLeftGroup = WN_LEFT_GROUP;
constexpr int64_t kLongLine = WN_LONG_LINE;
constexpr int kTileRows = WN_TILE_ROWS;
constexpr int64_t kPartColumns = WN_PART_COLUMNS;
constexpr int64_t kAtOnceBytes = WN_AT_ONCE_BYTES;
constexpr int kVectorBytes = WN_VECTOR_BYTES;

template <typename T>
constexpr T kLeast = std::is_same_v<T, float> ? T(WN_LEAST_FLOAT) : T(WN_LEAST_DOUBLE);
template <typename T>
constexpr T kMost = std::is_same_v<T, float> ? T(WN_MOST_FLOAT) : T(WN_MOST_DOUBLE);

}  // namespace wn_kernels
