// Included once for each element type and instruction set by task_products.cpp, which defines REAL, VECTOR_BYTES and
// CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written under it, not what is
// instantiated from it.

namespace CAPABILITY_NAMESPACE {

#include "cpu/isa/vectors.inl"

// Of the summed index, and of columns: what is laid out of the right factor at a time stays in the second cache, and a block of
// its columns in the first, while groups of rows pass by.
constexpr int64_t depth_at_a_time = 1024 / sizeof(REAL), columns_at_a_time = 1024 / sizeof(REAL);
// Groups of rows that pass a block of columns by before the next block.
constexpr int64_t groups_at_a_time = 16;

// from + sum_k a_k b_k over `depth`, for `rows` rows and a block of columns, b laid out in rows of a block. Without a `from`, 0.
// The accumulators stay in registers: six rows of two vectors, and the operands, are what sixteen registers hold.
inline __attribute__((always_inline)) void tile(const int rows, int64_t depth, const REAL* __restrict a, int64_t a_row, const REAL* __restrict b,
                                                const REAL* from, int64_t from_row, REAL* to, int64_t to_row) {
  Vector sums[6][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = from ? load(from + r * from_row) : Vector{};
    sums[r][1] = from ? load(from + r * from_row + width) : Vector{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, b += block) {
    const Vector first = load(b), second = load(b + width);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const REAL factor = a[r * a_row + k];
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    store(sums[r][0], to + r * to_row);
    store(sums[r][1], to + r * to_row + width);
  }
}

// The same for any number of rows up to six; each case is compiled apart.
void tile_of(int64_t rows, int64_t depth, const REAL* a, int64_t a_row, const REAL* b, const REAL* from, int64_t from_row, REAL* to, int64_t to_row) {
  switch (rows) {
    case 1: return tile(1, depth, a, a_row, b, from, from_row, to, to_row);
    case 2: return tile(2, depth, a, a_row, b, from, from_row, to, to_row);
    case 3: return tile(3, depth, a, a_row, b, from, from_row, to, to_row);
    case 4: return tile(4, depth, a, a_row, b, from, from_row, to, to_row);
    case 5: return tile(5, depth, a, a_row, b, from, from_row, to, to_row);
    case 6: return tile(6, depth, a, a_row, b, from, from_row, to, to_row);
  }
}

// packed[j / block][k][j % block] = right[k][j], and zeros after the last column.
void lay_out(int64_t depth, int64_t columns, const REAL* right, int64_t row, int64_t column, REAL* packed) {
  if (row == 1) return pack(columns, depth, right, column, packed);
  for (int64_t j = 0; j < columns; j += block, packed += depth * block) {
    const int64_t n = std::min(block, columns - j);
    if (n < block) std::fill(packed, packed + depth * block, REAL(0));
    for (int64_t k = 0; k < depth; ++k) {
      const REAL* from = right + k * row + j * column;
      if (n == block && column == 1) {
        // Rows are too far apart for the processor to foresee them.
        __builtin_prefetch(from + 12 * row);
        __builtin_prefetch(from + 12 * row + block - 1);
        store(load(from), packed + k * block);
        store(load(from + width), packed + k * block + width);
      } else {
        for (int64_t c = 0; c < n; ++c) packed[k * block + c] = from[c * column];
      }
    }
  }
}

// to = from + left right; from may be to, or null for 0.
void product(int64_t rows, int64_t columns, int64_t depth, const REAL* left, int64_t left_row, const REAL* packed, const REAL* from,
             int64_t from_row, REAL* to, int64_t to_row) {
  const Groups groups(rows);
  REAL edge[6 * block];
  for (int64_t some = 0; some < groups.count; some += groups_at_a_time) {
    const int64_t last = std::min(some + groups_at_a_time, groups.count);
    for (int64_t j = 0; j < columns; j += block) {
      const REAL* b = packed + j * depth;
      for (int64_t g = some; g < last; ++g) {
        const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
        const REAL* a = left + i * left_row;
        // The next rows come while these are multiplied for the first time.
        for (int64_t r = n; j == 0 && r < std::min(2 * n, rows - i); ++r) {
          for (int64_t k = 0; k < depth; k += 64 / int64_t(sizeof(REAL))) __builtin_prefetch(a + r * left_row + k);
        }
        if (columns - j >= block) {
          tile_of(n, depth, a, left_row, b, from ? from + i * from_row + j : nullptr, from_row, to + i * to_row + j, to_row);
          continue;
        }
        // What lies beyond the last column is not ours to read or write.
        std::fill(edge, edge + 6 * block, REAL(0));
        for (int64_t r = 0; from && r < n; ++r) std::copy_n(from + (i + r) * from_row + j, columns - j, edge + r * block);
        tile_of(n, depth, a, left_row, b, edge, block, edge, block);
        for (int64_t r = 0; r < n; ++r) std::copy_n(edge + r * block, columns - j, to + (i + r) * to_row + j);
      }
    }
  }
}

void sum_of_products(int64_t rows, int64_t columns, int64_t terms, const Term<REAL>* factors, const REAL* from, int64_t from_row, REAL* to,
                     int64_t to_row, REAL* packed) {
  for (int64_t j = 0; j < columns; j += columns_at_a_time) {
    const int64_t some_columns = std::min(columns_at_a_time, columns - j);
    const REAL* before = from ? from + j : nullptr;
    int64_t before_row = from_row;
    for (int64_t t = 0; t < terms; ++t) {
      const auto& [left, left_row, right, right_row, right_column, depth] = factors[t];
      const int64_t parts = (depth + depth_at_a_time - 1) / depth_at_a_time;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t k = part * depth / parts, some_depth = (part + 1) * depth / parts - k;
        lay_out(some_depth, some_columns, right + k * right_row + j * right_column, right_row, right_column, packed);
        product(rows, some_columns, some_depth, left + k, left_row, packed, before, before_row, to + j, to_row);
        before = to + j;
        before_row = to_row;
      }
    }
  }
}

const TaskProducts<REAL> table{depth_at_a_time * columns_at_a_time, sum_of_products};

}  // namespace CAPABILITY_NAMESPACE
