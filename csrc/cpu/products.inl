// Included once for each element type and instruction set by products.cpp, which defines REAL, VECTOR_BYTES and
// CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written under it, not what is
// instantiated from it.

namespace CAPABILITY_NAMESPACE {

#include "cpu/vectors.inl"

// What a tile multiplies for one pair of factors: a_k is a column and b_k a row. They move on from tile to tile of a run.
struct Strip {
  const REAL* a;
  int64_t a_row, a_step, a_tile;
  const REAL* b;
  int64_t b_step, b_tile;
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

// Which strides are constant, so that the loop of a product is short of instructions: where another thread of the core is busy,
// they are what it is bound by, not the arithmetic.
enum Product { of_outer, of_to_rows, of_to_keys };

// c = alpha sum_k a_k b_k over the depth of every strip, or c + that. The accumulators stay in registers: six rows of two vectors,
// and the operands, are what sixteen registers hold.
inline __attribute__((always_inline)) void run_tiles(const Product product, const int rows, const int vectors, const Strip* strips, const Run& run) {
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
      const int64_t a_row = product == of_to_keys ? 1 : strip.a_row, a_step = product == of_to_keys ? strip.a_step : 1;
      const int64_t b_step = product == of_outer ? block : strip.b_step;
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
        b += b_step;
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

// The same for any number of rows up to six; each case is compiled apart.
#define METAFAST_RUN(NAME, PRODUCT, VECTORS)                       \
  void NAME(int64_t rows, const Strip* strips, const Run& run) {   \
    switch (rows) {                                                \
      case 1: return run_tiles(PRODUCT, 1, VECTORS, strips, run);  \
      case 2: return run_tiles(PRODUCT, 2, VECTORS, strips, run);  \
      case 3: return run_tiles(PRODUCT, 3, VECTORS, strips, run);  \
      case 4: return run_tiles(PRODUCT, 4, VECTORS, strips, run);  \
      case 5: return run_tiles(PRODUCT, 5, VECTORS, strips, run);  \
      case 6: return run_tiles(PRODUCT, 6, VECTORS, strips, run);  \
    }                                                              \
  }
METAFAST_RUN(run_outer, of_outer, 2)
METAFAST_RUN(run_to_rows, of_to_rows, 2)
METAFAST_RUN(run_half_to_rows, of_to_rows, 1)
METAFAST_RUN(run_to_keys, of_to_keys, 2)
#undef METAFAST_RUN

void unpack(int64_t columns, int64_t depth, const REAL* blocked, REAL* keys, int64_t stride) {
  for (int64_t j = 0; j < columns; j += block) {
    transpose(depth, std::min(block, columns - j), blocked + j * depth, block, keys + j * stride, stride);
  }
}

// Keys that are worked on at a time stay in the core's second cache while the rows of a panel pass by. More of them are fewer
// passes over what is summed into.
int64_t keys_at_a_time(int64_t depth, int64_t terms) {
  constexpr int64_t cache = 128 * 1024, fewest = 64, most = 512;
  return std::clamp(cache / (terms * std::max<int64_t>(depth, 1) * int64_t(sizeof(REAL))) / block * block, fewest, most);
}

void outer(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* x, int64_t stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  const int64_t at_a_time = keys_at_a_time(depth, terms);
  for (int64_t first = 0; first < columns; first += at_a_time) {
    const int64_t tiles = (std::min(columns - first, at_a_time) + block - 1) / block;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
      for (int64_t t = 0; t < terms; ++t) {
        const auto& [rows, row_stride, blocked, _] = factors[t];
        strips[t] = {rows + i * row_stride, row_stride, 1, 0, blocked + first * depth, block, block * depth};
      }
      run_outer(n, strips, {tiles, terms, depth, alpha, false, x + i * stride + first, stride, block});
    }
  }
}

// One column of to_rows for keys [0, n_keys): what is left of a depth that is no multiple of a vector.
void column_to_rows(int64_t count, const Strip* strips, const Run& run) {
  for (int64_t r = 0; r < count; ++r) {
    REAL sum = 0;
    for (int64_t t = 0; t < run.terms; ++t) {
      const Strip& one = strips[t];
      for (int64_t k = 0; k < run.depth; ++k) sum += one.a[r * one.a_row + k] * one.b[k * one.b_step];
    }
    REAL& to = run.c[r * run.c_row];
    to = run.accumulate ? to + run.alpha * sum : run.alpha * sum;
  }
}

void to_rows(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* rows, int64_t row_stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  const int64_t at_a_time = keys_at_a_time(depth, terms);
  for (int64_t first = 0; first < columns; first += at_a_time) {
    const int64_t n_keys = std::min(columns - first, at_a_time);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
      const auto strips_at = [&](int64_t at) {
        for (int64_t t = 0; t < terms; ++t) {
          const auto& [x, stride, keys, key_stride] = factors[t];
          strips[t] = {x + i * stride + first, stride, 1, 0, keys + first * key_stride + at, key_stride, block};
        }
        return strips;
      };
      const auto run_at = [&](int64_t at, int64_t tiles) {
        return Run{tiles, terms, n_keys, alpha, first > 0, rows + i * row_stride + at, row_stride, block};
      };
      const int64_t blocks = depth / block, vectors = depth / width, half = blocks * block;
      run_to_rows(n, strips_at(0), run_at(0, blocks));
      if (vectors > 2 * blocks) run_half_to_rows(n, strips_at(half), run_at(half, 1));
      for (int64_t at = vectors * width; at < depth; ++at) column_to_rows(n, strips_at(at), run_at(at, 1));
    }
  }
}

void to_keys(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* blocked) {
  const Groups groups(depth);
  Strip strips[most_terms];
  for (int64_t j = 0; j < columns; j += block) {
    // Tiles of n columns of the keys each, from column c on.
    const auto run_from = [&](int64_t c, int64_t n, int64_t tiles) {
      for (int64_t t = 0; t < terms; ++t) {
        const auto& [x, stride, rows, row_stride] = factors[t];
        strips[t] = {rows + c, 1, row_stride, n, x + j, stride, 0};
      }
      run_to_keys(n, strips, {tiles, terms, count, alpha, true, blocked + j * depth + c * block, block, n * block});
    };
    if (groups.larger > 0) run_from(0, groups.size + 1, groups.larger);
    run_from(groups.first(groups.larger), groups.size, groups.count - groups.larger);
  }
}

const Products<REAL> table{block, pack, unpack, outer, to_rows, to_keys};

}  // namespace CAPABILITY_NAMESPACE
