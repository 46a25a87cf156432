// Included once for each element type and instruction set by products.cpp, which defines REAL, VECTOR_BYTES and
// CAPABILITY_NAMESPACE. Plain functions, not templates: a target pragma reaches what is written under it, not what is
// instantiated from it.

namespace CAPABILITY_NAMESPACE {

typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL UnalignedVector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

constexpr int64_t width = VECTOR_BYTES / sizeof(REAL), block = 2 * width;

inline __attribute__((always_inline)) Vector load(const REAL* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline __attribute__((always_inline)) void store(Vector vector, REAL* to) { *reinterpret_cast<UnalignedVector*>(to) = vector; }

// What a tile multiplies for one pair of factors: a_k is a column and b_k a row.
struct Strip {
  const REAL* a;
  int64_t a_row, a_step;
  const REAL* b;
  int64_t b_step;
};
constexpr int64_t most_terms = 2;

// c = alpha sum_k a_k b_k over the depth of every strip, or c + that: c is [rows, vectors * width]. The accumulators stay in
// registers: six rows of two vectors, and the operands, are what sixteen registers hold.
inline __attribute__((always_inline)) void tile(
    const int rows, const int vectors, int64_t terms, const Strip* strips, int64_t depth, REAL alpha, bool accumulate,
    REAL* __restrict c, int64_t c_row) {
  Vector sums[6][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = Vector{};
    sums[r][1] = Vector{};
  }
  for (int64_t t = 0; t < terms; ++t) {
    const REAL *__restrict a = strips[t].a, *__restrict b = strips[t].b;
    const int64_t a_row = strips[t].a_row, a_step = strips[t].a_step, b_step = strips[t].b_step;
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
      const Vector product = alpha * sums[r][v];
      store(accumulate ? load(to) + product : product, to);
    }
  }
}

// The same for any number of rows up to six; each case is compiled apart.
__attribute__((noinline)) void tile_of(int64_t rows, int64_t vectors, int64_t terms, const Strip* strips, int64_t depth, REAL alpha,
                                       bool accumulate, REAL* c, int64_t c_row) {
#define METAFAST_TILE(ROWS)                                                                     \
  case ROWS:                                                                                    \
    if (vectors == 2) return tile(ROWS, 2, terms, strips, depth, alpha, accumulate, c, c_row); \
    return tile(ROWS, 1, terms, strips, depth, alpha, accumulate, c, c_row);
  switch (rows) {
    METAFAST_TILE(1)
    METAFAST_TILE(2)
    METAFAST_TILE(3)
    METAFAST_TILE(4)
    METAFAST_TILE(5)
    METAFAST_TILE(6)
  }
#undef METAFAST_TILE
}

// Rows in groups of at most six, as equal as can be: [first(g), first(g + 1)) is the g-th.
struct Groups {
  explicit Groups(int64_t rows_) : rows(rows_), count((rows_ + 5) / 6) {}
  int64_t first(int64_t g) const { return g * rows / count; }
  int64_t rows, count;
};

// A square of four, transposed by shuffles of vectors of four where an element at a time would take several times as long.
typedef REAL Four __attribute__((vector_size(4 * sizeof(REAL))));
typedef REAL UnalignedFour __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef INTEGER Indices __attribute__((vector_size(4 * sizeof(REAL))));

inline __attribute__((always_inline)) void transpose_four(const REAL* from, int64_t from_stride, REAL* to, int64_t to_stride) {
#define METAFAST_ROW(DATA, TYPE) (*reinterpret_cast<TYPE*>(DATA))
  const Four a = METAFAST_ROW(from, const UnalignedFour), b = METAFAST_ROW(from + from_stride, const UnalignedFour);
  const Four c = METAFAST_ROW(from + 2 * from_stride, const UnalignedFour), d = METAFAST_ROW(from + 3 * from_stride, const UnalignedFour);
  const Four low_ab = __builtin_shuffle(a, b, Indices{0, 4, 1, 5}), high_ab = __builtin_shuffle(a, b, Indices{2, 6, 3, 7});
  const Four low_cd = __builtin_shuffle(c, d, Indices{0, 4, 1, 5}), high_cd = __builtin_shuffle(c, d, Indices{2, 6, 3, 7});
  METAFAST_ROW(to, UnalignedFour) = __builtin_shuffle(low_ab, low_cd, Indices{0, 1, 4, 5});
  METAFAST_ROW(to + to_stride, UnalignedFour) = __builtin_shuffle(low_ab, low_cd, Indices{2, 3, 6, 7});
  METAFAST_ROW(to + 2 * to_stride, UnalignedFour) = __builtin_shuffle(high_ab, high_cd, Indices{0, 1, 4, 5});
  METAFAST_ROW(to + 3 * to_stride, UnalignedFour) = __builtin_shuffle(high_ab, high_cd, Indices{2, 3, 6, 7});
#undef METAFAST_ROW
}

// to[c][r] = from[r][c]
void transpose(int64_t rows, int64_t columns, const REAL* from, int64_t from_stride, REAL* to, int64_t to_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4) {
    for (int64_t c = 0; c < whole_columns; c += 4) transpose_four(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

void pack(int64_t columns, int64_t depth, const REAL* keys, int64_t stride, REAL* blocked) {
  for (int64_t j = 0; j < columns; j += block) {
    const int64_t n = std::min(block, columns - j);
    if (n < block) std::fill(blocked + j * depth, blocked + (j + block) * depth, REAL(0));
    transpose(n, depth, keys + j * stride, stride, blocked + j * depth, block);
  }
}

void unpack(int64_t columns, int64_t depth, const REAL* blocked, REAL* keys, int64_t stride) {
  for (int64_t j = 0; j < columns; j += block) {
    transpose(depth, std::min(block, columns - j), blocked + j * depth, block, keys + j * stride, stride);
  }
}

// Keys that are worked on at a time stay in the nearest cache, at usual depths, while the rows of a panel pass by.
constexpr int64_t keys_at_a_time = 64;

void outer(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* x, int64_t stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  for (int64_t first = 0; first < columns; first += keys_at_a_time) {
    const int64_t last = std::min(columns, first + keys_at_a_time);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
      for (int64_t j = first; j < last; j += block) {
        for (int64_t t = 0; t < terms; ++t) {
          const auto& [rows, row_stride, blocked, _] = factors[t];
          strips[t] = {rows + i * row_stride, row_stride, 1, blocked + j * depth, block};
        }
        tile_of(n, 2, terms, strips, depth, alpha, false, x + i * stride + j, stride);
      }
    }
  }
}

// One column of to_rows for keys [0, n_keys): what is left of a depth that is no multiple of a vector.
void column_to_rows(int64_t count, int64_t n_keys, REAL alpha, int64_t terms, const Strip* strips, bool accumulate, REAL* c, int64_t c_row) {
  for (int64_t r = 0; r < count; ++r) {
    REAL sum = 0;
    for (int64_t t = 0; t < terms; ++t) {
      const Strip& one = strips[t];
      for (int64_t k = 0; k < n_keys; ++k) sum += one.a[r * one.a_row + k] * one.b[k * one.b_step];
    }
    REAL& to = c[r * c_row];
    to = accumulate ? to + alpha * sum : alpha * sum;
  }
}

void to_rows(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* rows, int64_t row_stride) {
  const Groups groups(count);
  Strip strips[most_terms];
  for (int64_t first = 0; first < columns; first += keys_at_a_time) {
    const int64_t n_keys = std::min(columns - first, keys_at_a_time);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t i = groups.first(g), n = groups.first(g + 1) - i;
      const auto strips_at = [&](int64_t at) {
        for (int64_t t = 0; t < terms; ++t) {
          const auto& [x, stride, keys, key_stride] = factors[t];
          strips[t] = {x + i * stride + first, stride, 1, keys + first * key_stride + at, key_stride};
        }
        return strips;
      };
      REAL* c = rows + i * row_stride;
      int64_t at = 0;
      for (; at + width <= depth; at += block) {
        tile_of(n, at + block <= depth ? 2 : 1, terms, strips_at(at), n_keys, alpha, first > 0, c + at, row_stride);
      }
      for (at = depth / width * width; at < depth; ++at) {
        column_to_rows(n, n_keys, alpha, terms, strips_at(at), first > 0, c + at, row_stride);
      }
    }
  }
}

void to_keys(int64_t count, int64_t columns, int64_t depth, REAL alpha, int64_t terms, const Factors<REAL>* factors, REAL* blocked) {
  const Groups groups(depth);
  Strip strips[most_terms];
  for (int64_t j = 0; j < columns; j += block) {
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t c = groups.first(g), n = groups.first(g + 1) - c;
      for (int64_t t = 0; t < terms; ++t) {
        const auto& [x, stride, rows, row_stride] = factors[t];
        strips[t] = {rows + c, 1, row_stride, x + j, stride};
      }
      tile_of(n, 2, terms, strips, count, alpha, true, blocked + j * depth + c * block, block);
    }
  }
}

const Products<REAL> table{block, pack, unpack, outer, to_rows, to_keys};

}  // namespace CAPABILITY_NAMESPACE
