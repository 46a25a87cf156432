// Included once for each element type and instruction set by products.cpp, which defines REAL, VECTOR_BYTES and
// CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written under it, not what is
// instantiated from it.

namespace CAPABILITY_NAMESPACE {

#include "cpu/isa/vectors.inl"

// What a tile multiplies for one pair of factors: a_k is a column and b_k a row of a block. They move on from tile to tile of a run.
struct Strip {
  const REAL* a;
  int64_t a_stride, a_tile;
  const REAL* b;
  int64_t b_tile;
};
constexpr int64_t most_terms = 2;

// Tiles of one size, one after another: c is [rows, vectors * width].
struct Run {
  int64_t tiles, terms, depth;
  REAL alpha;
  bool accumulate;
  REAL* c;
  int64_t c_row, c_tile;
};

// c = alpha sum_k a_k b_k over the depth of every strip, or c + that. The accumulators stay in registers: six rows of two vectors,
// and the operands, are what sixteen registers hold. Strides are constant where they can be, so that the loop is short of
// instructions: where another thread of the core is busy, they are what it is bound by, not the arithmetic.
inline __attribute__((always_inline)) void run_tiles(const bool transposed, const int rows, const int vectors, const Strip* strips, const Run& run) {
  const int64_t tiles = run.tiles, terms = run.terms, depth = run.depth, c_row = run.c_row, c_tile = run.c_tile;
  const REAL alpha = run.alpha;
  const bool accumulate = run.accumulate;
  REAL* __restrict c = run.c;
  for (int64_t i = 0; i < tiles; ++i, c += c_tile) {
    Vector sums[6][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      sums[r][0] = Vector{};
      sums[r][1] = Vector{};
    }
    for (int64_t t = 0; t < terms; ++t) {
      const Strip& strip = strips[t];
      const REAL *__restrict a = strip.a + i * strip.a_tile, *__restrict b = strip.b + i * strip.b_tile;
      const int64_t a_row = transposed ? 1 : strip.a_stride, a_step = transposed ? strip.a_stride : 1;
#pragma GCC unroll 4
      for (int64_t k = 0; k < depth; ++k) {
        const Vector first = load(b), second = vectors > 1 ? load(b + width) : Vector{};
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const REAL factor = a[r * a_row];
          sums[r][0] += factor * first;
          if (vectors > 1) sums[r][1] += factor * second;
        }
        a += a_step;
        b += block;
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        REAL* to = c + r * c_row + v * width;
        const Vector scaled = alpha * sums[r][v];
        store(accumulate ? load(to) + scaled : scaled, to);
      }
    }
  }
}

// The same for any number of rows up to six; each case is compiled apart. The left factor is a panel's rows, or its columns.
#define METAFAST_RUN(NAME, TRANSPOSED, VECTORS)                       \
  void NAME(int64_t rows, const Strip* strips, const Run& run) {      \
    switch (rows) {                                                   \
      case 1: return run_tiles(TRANSPOSED, 1, VECTORS, strips, run);  \
      case 2: return run_tiles(TRANSPOSED, 2, VECTORS, strips, run);  \
      case 3: return run_tiles(TRANSPOSED, 3, VECTORS, strips, run);  \
      case 4: return run_tiles(TRANSPOSED, 4, VECTORS, strips, run);  \
      case 5: return run_tiles(TRANSPOSED, 5, VECTORS, strips, run);  \
      case 6: return run_tiles(TRANSPOSED, 6, VECTORS, strips, run);  \
    }                                                                 \
  }
METAFAST_RUN(run_rows, false, 2)
METAFAST_RUN(run_rows_half, false, 1)
METAFAST_RUN(run_columns, true, 2)
METAFAST_RUN(run_columns_half, true, 1)
#undef METAFAST_RUN

// A run whose c is a slice of a matrix, `columns` of a block: those that end inside of a vector are written one at a time.
using RunTiles = void (*)(int64_t rows, const Strip* strips, const Run& run);
void run_slice(RunTiles whole, RunTiles half, int64_t rows, int64_t columns, Strip* strips, Run run) {
  if (columns == block) return whole(rows, strips, run);
  if (columns == width) return half(rows, strips, run);
  REAL edge[6 * block];
  for (int64_t i = 0; i < run.tiles; ++i, run.c += run.c_tile) {
    (columns < width ? half : whole)(rows, strips, {1, run.terms, run.depth, run.alpha, false, edge, block, 0});
    for (int64_t r = 0; r < rows; ++r) {
      REAL* to = run.c + r * run.c_row;
      for (int64_t c = 0; c < columns; ++c) to[c] = run.accumulate ? to[c] + edge[r * block + c] : edge[r * block + c];
    }
    for (int64_t t = 0; t < run.terms; ++t) strips[t].a += strips[t].a_tile;
  }
}

void slice(int64_t rows, int64_t depth, const REAL* from, int64_t stride, REAL* slices, int64_t slice_size) {
  for (int64_t at = 0; at < depth; at += block, slices += slice_size) {
    const int64_t n = std::min(block, depth - at);
    for (int64_t i = 0; i < rows; ++i) {
      const REAL* row = from + i * stride + at;
      REAL* to = slices + i * block;
      if (n == block) {
        store(load(row), to);
        store(load(row + width), to + width);
      } else {
        std::copy(row, row + n, to);
        std::fill(to + n, to + block, REAL(0));
      }
    }
  }
}

// Keys that are worked on at a time, of which `bytes` a key are read, stay in a cache while the rows of a panel pass by. More of
// them are fewer passes over what is summed into.
int64_t keys_at_a_time(int64_t cache, int64_t bytes) {
  constexpr int64_t fewest = 64, most = 512;
  return std::clamp(cache / std::max<int64_t>(bytes, 1) / block * block, fewest, most);
}

void outer(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* x, int64_t stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  const int64_t at_a_time = keys_at_a_time(128 * 1024, terms * depth * int64_t(sizeof(REAL)));
  for (int64_t first = 0; first < columns; first += at_a_time) {
    const int64_t tiles = (std::min(columns - first, at_a_time) + block - 1) / block;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
      for (int64_t t = 0; t < terms; ++t) {
        const auto& [rows, row_stride, blocked, _] = factors[t];
        strips[t] = {rows + i * row_stride, row_stride, 0, blocked + first * depth, block * depth};
        prefetch(std::min<int64_t>(6, count - i - n), depth, rows + (i + n) * row_stride, row_stride);
      }
      run_rows(n, strips, {tiles, terms, depth, alpha, false, x + i * stride + first, stride, block});
    }
  }
}

void to_rows(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* rows, int64_t row_stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  const int64_t at_a_time = keys_at_a_time(32 * 1024, terms * block * int64_t(sizeof(REAL)));
  for (int64_t first = 0; first < columns; first += at_a_time) {
    const int64_t n_keys = std::min(columns - first, at_a_time);
    for (int64_t at = 0; at < depth; at += block) {
      // Tiles of n rows each, from row i on.
      const auto run_from = [&](int64_t i, int64_t n, int64_t tiles) {
        for (int64_t t = 0; t < terms; ++t) {
          const auto& [x, stride, slices, slice_size] = factors[t];
          strips[t] = {x + i * stride + first, stride, n * stride, slices + at / block * slice_size + first * block, 0};
        }
        run_slice(run_rows, run_rows_half, n, std::min(block, depth - at), strips,
                  {tiles, terms, n_keys, alpha, first > 0, rows + i * row_stride + at, row_stride, n * row_stride});
      };
      run_from(0, groups.size + 1, groups.larger);
      run_from(groups.first(groups.larger), groups.size, groups.count - groups.larger);
    }
  }
}

void to_keys(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, bool accumulate, REAL* keys,
             int64_t key_stride) {
  const Groups groups(columns);
  Strip strips[most_terms];
  for (int64_t at = 0; at < depth; at += block) {
    // Tiles of n keys each, from key j on.
    const auto run_from = [&](int64_t j, int64_t n, int64_t tiles) {
      for (int64_t t = 0; t < terms; ++t) {
        const auto& [x, stride, slices, slice_size] = factors[t];
        strips[t] = {x + j, stride, n, slices + at / block * slice_size, 0};
      }
      run_slice(run_columns, run_columns_half, n, std::min(block, depth - at), strips,
                {tiles, terms, count, alpha, accumulate, keys + j * key_stride + at, key_stride, n * key_stride});
    };
    run_from(0, groups.size + 1, groups.larger);
    run_from(groups.first(groups.larger), groups.size, groups.count - groups.larger);
  }
}

const Products<REAL> table{block, 6, pack, slice, outer, to_rows, to_keys};

}  // namespace CAPABILITY_NAMESPACE
