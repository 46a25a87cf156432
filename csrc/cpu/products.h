// The matrix products of attention on one thread. A BLAS packs both operands anew in every call, for each panel of rows and for
// the smallest of heads; here what belongs to the keys of a head is laid out once and read by all of its panels, and neither the
// panel nor what has a row a query is copied at all.
//
// The layout is "blocked": [columns / block][depth][block], the transpose of [columns, depth] in pieces that are contiguous,
// with zeros after the last column. A panel x is [count, columns] with rows that are padded to a multiple of the block.
#pragma once

#include <cstdint>

namespace metafast {

// Two matrices to be multiplied, and how far apart their rows are. A product is a sum over such pairs, because derivatives come as
// sums of products: one pass reads and writes what is summed into once.
template <typename T>
struct Factors {
  const T* left;
  int64_t left_stride;
  const T* right;
  int64_t right_stride;
};

template <typename T>
struct Products {
  int64_t block;

  // blocked = keys, and keys = blocked, for keys [columns, depth].
  void (*pack)(int64_t columns, int64_t depth, const T* keys, int64_t stride, T* blocked);
  void (*unpack)(int64_t columns, int64_t depth, const T* blocked, T* keys, int64_t stride);

  // x = alpha sum rows keys^T: left is rows [count, depth], right blocked keys, whose stride is not read. Writes whole blocks.
  void (*outer)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, T* x, int64_t stride);
  // rows = alpha sum x keys: left is a panel, right keys [columns, depth].
  void (*to_rows)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, T* rows, int64_t row_stride);
  // blocked += alpha sum x^T rows: left is a panel, right rows [count, depth]. Reads and writes whole blocks: what a panel's
  // padding holds ends up after the last column.
  void (*to_keys)(int64_t count, int64_t columns, int64_t depth, T alpha, int64_t terms, const Factors<T>* factors, T* blocked);
};

// The widest variant that this machine runs.
template <typename T>
const Products<T>& products();

}  // namespace metafast
