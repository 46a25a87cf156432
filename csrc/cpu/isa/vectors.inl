// Included inside of CAPABILITY_NAMESPACE by what multiplies matrices: vectors of the instruction set, how rows are grouped into
// tiles, and the blocked layout (see products.h).

typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL UnalignedVector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

constexpr int64_t width = VECTOR_BYTES / sizeof(REAL), block = 2 * width;

inline __attribute__((always_inline)) Vector load(const REAL* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline __attribute__((always_inline)) void store(Vector vector, REAL* to) { *reinterpret_cast<UnalignedVector*>(to) = vector; }

// Rows in groups of at most six, as equal as can be, the larger ones first: [first(g), first(g + 1)) is the g-th.
struct Groups {
  explicit Groups(int64_t rows) : count((rows + 5) / 6), size(rows / std::max<int64_t>(count, 1)), larger(rows - count * size) {}
  int64_t first(int64_t g) const { return g * size + std::min(g, larger); }
  int64_t count, size, larger;
};

// Has rows brought to the first cache that are needed soon: they may lie far apart, and nothing but this says which are next.
inline __attribute__((always_inline)) void prefetch(int64_t rows, int64_t columns, const REAL* from, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(REAL))) __builtin_prefetch(from + i * stride + c);
  }
}

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
    prefetch(std::min(block, columns - j - n), depth, keys + (j + n) * stride, stride);
    if (n < block) std::fill(blocked + j * depth, blocked + (j + block) * depth, REAL(0));
    transpose(n, depth, keys + j * stride, stride, blocked + j * depth, block);
  }
}
